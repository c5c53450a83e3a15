// Typed handles to operators, looked up once.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace torch_divergence {

// static const auto op = typed_op<Signature>("torch_divergence::name"); op.call(...)
template <class Signature>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace torch_divergence
