#include "mechanisms/infini/layer_mass.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::infini {

std::vector<SlotMass> slot_masses(const at::Tensor& z_GK) {
  TORCH_CHECK_VALUE(z_GK.dim() == 2 && z_GK.size(1) > 0, "infini: masses of z ", z_GK.sizes(),
                    "; [heads, slots] of one sequence is needed");
  const at::Tensor z = z_GK.detach().to(at::kCPU, at::kDouble).contiguous();
  std::vector<SlotMass> heads;
  for (std::int64_t g = 0; g < z.size(0); ++g) {
    const double* const slots = z[g].const_data_ptr<double>();
    const auto [least, most] = std::minmax_element(slots, slots + z.size(1));
    heads.push_back({z[g].mean().item<double>(), *least, *most});
  }
  return heads;
}

}  // namespace everlong::infini
