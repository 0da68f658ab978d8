#include "golden_case.h"

#include <algorithm>

#include "golden_kinds.h"
#include "mechanisms/mechanism.h"

namespace everlong::golden {
namespace {

constexpr const char* kFormat = "everlong-golden-1";

const Operator* find_operator(std::string_view mechanism, std::string_view kind,
                              std::string& reason) {
  const auto room = find_mechanism(mechanism);
  if (!room.ok()) {
    reason = cat("no mechanism \"", mechanism, "\" in this build");
    return nullptr;
  }
  std::vector<std::string> kinds;
  for (const Operator* op : (*room)->operators) {
    if (op->kind() == kind) return op;
    kinds.emplace_back(op->kind());
  }
  reason = cat(mechanism, " offers no \"", kind, "\"; it has ",
               kinds.empty() ? "no operators" : join(kinds, ", "));
  return nullptr;
}

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

// A form that takes no float64 runs in fp32 and may be as wrong there as law 1 allows: twice the
// error of the naive form (of composite, where there is none), plus 30 ulps for sums in another
// order.
constexpr double kFloorFloat32 = 4e-6;

Shares rounding_of_float32(const Operator& op, const Case& wanted, const OpCall& call) {
  Shares shares;
  for (const char* const form : {"naive", "composite"}) {
    const auto plain = op.run(form, call);
    if (!plain.ok()) continue;
    shares = relative_errors(wanted, *plain);
    break;
  }
  for (auto& [name, share] : shares) share = 2 * share + kFloorFloat32;
  return shares;
}

}  // namespace

Verdict check_operator(const Case& wanted, const std::string& mechanism, const std::string& kind) {
  std::string reason;
  const Operator* const op = find_operator(mechanism, kind, reason);
  if (op == nullptr) return {Outcome::kNotApplicable, reason};
  std::string forms;
  double worst = 0;
  for (const OpForm& form : op->forms()) {
    if (!form.cpu) continue;
    OpCall call = form.float64 ? wanted.call : in_float32(wanted.call);
    for (auto& [name, x] : call.state)  // some states are fp64 whatever the inputs are
      if (!form.float64 && x.is_floating_point()) x = x.to(op->state_dtype(at::kFloat));
    const Shares more = form.float64 ? Shares{} : rounding_of_float32(*op, wanted, call);
    const auto result = op->run(form.name, call);
    if (!result.ok()) return failed(cat(form.name, ": ", result.status().message()));
    double error = 0;
    if (const auto why = difference(wanted, *result, error, more))
      return failed(cat(form.name, ": ", *why));
    forms += cat(forms.empty() ? "" : ", ", form.name);
    if (!form.float64) forms += cat(" (fp32, error ", error, ")");
    if (form.float64) worst = std::max(worst, error);
  }
  if (forms.empty())
    return {Outcome::kNotApplicable, cat(kind, " has no form that runs on the CPU")};
  return {Outcome::kPassed, cat(forms, "; largest error ", worst)};
}

Result<std::vector<fs::path>> find_files(const fs::path& root) {
  std::error_code error;
  if (!fs::exists(root, error)) return not_found(root.string(), ": there is no such folder");
  std::vector<fs::path> files;
  if (fs::is_directory(root, error)) {
    for (fs::recursive_directory_iterator
             it(root, fs::directory_options::skip_permission_denied, error),
         end;
         !error && it != end; it.increment(error))
      if (it->path().extension() == ".safetensors" && !it->is_directory(error))
        files.push_back(it->path());
    if (error) return io_error(root.string(), ": cannot list the folder: ", error.message());
  } else {
    files.push_back(root);
  }
  std::ranges::sort(files);
  return files;
}

Verdict check(const fs::path& path) {
  const auto file = SafetensorsFile::open(path);
  if (!file.ok()) return failed(file.status().message());
  const auto& metadata = file->metadata();
  const auto value = [&](const std::string& key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  if (value("format").empty() || !value("format").starts_with("everlong-golden"))
    return {Outcome::kNotGolden, "no golden metadata"};
  if (value("format") != kFormat)
    return failed(
        cat("format \"", value("format"), "\" is not known; this program reads ", kFormat));
  for (const char* const key : {"mechanism", "level", "kind"})
    if (value(key).empty()) return failed(cat("metadata ", key, " is missing"));

  // A file that nobody can run is still a file that must be whole.
  const auto wanted = read_case(*file);
  if (!wanted.ok()) return failed(wanted.status().message());
  const std::string level = value("level"), mechanism = value("mechanism"), kind = value("kind");
  if (mechanism == "megalodon") return check_megalodon(*wanted, level, kind);
  if (mechanism == "landmark" && level != "op")
    if (auto verdict = check_landmark(*wanted, kind, path.parent_path())) return *verdict;
  if (mechanism == "longnet" && level == "layer")
    if (auto verdict = check_longnet(*wanted, kind)) return *verdict;
  if (level == "layer") return check_layer(*wanted, mechanism, kind);
  if (level == "model") return check_model(*wanted, mechanism, kind, path.parent_path());
  if (level != "op")
    return {Outcome::kNotApplicable,
            cat("level \"", level, "\" is not checked here; op, layer and model are")};
  return check_operator(*wanted, mechanism, kind);
}

}  // namespace everlong::golden
