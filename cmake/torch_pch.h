// What nearly every file above the kernels includes; precompiled once (EVERLONG_PCH). Files still
// include what they use.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/nn/module.h>
