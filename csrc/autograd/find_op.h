#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace esper::autograd {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace esper::autograd
