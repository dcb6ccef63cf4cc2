// String arguments of ops.
#pragma once

#include <string>

#include "binding/check.h"

namespace fi::binding {

// A string argument, owned. (The stable ABI's own conversion to std::string leaks one string a call in
// torch 2.13.)
class StringArgument {
 public:
  explicit StringArgument(StringHandle handle) : handle_(handle) {}
  StringArgument(const StringArgument&) = delete;
  ~StringArgument() { torch_delete_string(handle_); }
  std::string text() const {
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

}  // namespace fi::binding
