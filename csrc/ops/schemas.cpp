// Defines the operators. Their schemas stand in dnl_ext/schemas.inc, which Python reads where nothing is compiled.
#include <torch/csrc/stable/library.h>

#define DNL_SCHEMA(text) m.def(text);

STABLE_TORCH_LIBRARY_FRAGMENT(dnl_ext, m) {
#include "../../dnl_ext/schemas.inc"
}
