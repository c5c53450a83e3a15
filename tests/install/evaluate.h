#pragma once
#include <ATen/core/Tensor.h>

// The mean of KL(teacher || student) and of KL(student || teacher).
double symmetric_kl(const at::Tensor& student, const at::Tensor& teacher);
