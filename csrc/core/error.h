#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace eapo {

// A bad argument: ValueError in Python.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A call in the wrong order or a broken invariant: RuntimeError in Python.
class InvalidState : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// No block is free: OutOfBlocks (a RuntimeError) in Python.
class OutOfBlocks : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The message says what was got, what is allowed and, where it helps, what to do.
template <class... Parts>
void require(bool ok, const Parts&... message) {
  if (!ok) [[unlikely]] throw InvalidArgument(join(message...));
}

template <class... Parts>
void ensure(bool ok, const Parts&... message) {
  if (!ok) [[unlikely]] throw InvalidState(join(message...));
}

}  // namespace eapo
