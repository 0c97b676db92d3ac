#pragma once

#include <iostream>
#include <string>
#include <string_view>

// A unit test without a framework: EXPECT and THROWS count failures, run() reports them.
namespace eapo_test {

inline int failures = 0;

inline void fail(std::string_view what, const char* file, int line) {
  ++failures;
  std::cerr << file << ':' << line << ": " << what << '\n';
}

// Whether `call` throws an `Error` with `part` in its message.
template <class Error, class Call>
bool throws(Call call, std::string_view part) {
  try {
    call();
  } catch (const Error& error) {
    return std::string_view(error.what()).find(part) != std::string_view::npos;
  }
  return false;
}

template <class... Tests>
int run(Tests... tests) {
  (tests(), ...);
  std::cout << sizeof...(tests) << " tests, " << failures << " failures\n";
  return failures == 0 ? 0 : 1;
}

// The integer behind `name` on the command line, or `fallback`.
inline int option(int argc, char** argv, std::string_view name, int fallback) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (argv[i] == name) return std::stoi(argv[i + 1]);
  }
  return fallback;
}

}  // namespace eapo_test

#define EXPECT(condition) \
  ((condition) ? void() : eapo_test::fail("expected " #condition, __FILE__, __LINE__))

#define THROWS(Error, part, ...)                                 \
  (eapo_test::throws<Error>([&] { (void)(__VA_ARGS__); }, part)  \
       ? void()                                                  \
       : eapo_test::fail("expected " #Error ": " part, __FILE__, __LINE__))
