// Several registers at a time: the layer between simd.h and the algorithms of csrc/common.
#pragma once

#include "simd.h"

namespace diffratio {
namespace {

// The operations of Philox on n registers of counters at a time. Instructions of the n registers alternate, so that the
// processor executes n independent dependency chains in parallel.
template <class V, int n>
struct Several {
  struct Word {
    typename V::Word r[n];
  };
  struct Product {
    typename V::Product r[n];
  };

#define DR_EACH(Result, expression)                  \
  Result out;                                        \
  for (int i = 0; i < n; ++i) out.r[i] = expression; \
  return out

  static DR_HOST_DEVICE Word word(uint32_t a) { DR_EACH(Word, V::word(a)); }
  static DR_HOST_DEVICE Word counters(uint32_t first) { DR_EACH(Word, V::counters(first + i * V::lanes)); }
  static DR_HOST_DEVICE Product multiply(const Word& a, uint32_t m) { DR_EACH(Product, V::multiply(a.r[i], m)); }
  static DR_HOST_DEVICE Word high(const Product& p) { DR_EACH(Word, V::high(p.r[i])); }
  static DR_HOST_DEVICE Word low(const Product& p) { DR_EACH(Word, V::low(p.r[i])); }
  static DR_HOST_DEVICE Word exclusive_or(const Word& a, const Word& b, uint32_t key) {
    DR_EACH(Word, V::exclusive_or(a.r[i], b.r[i], key));
  }
#undef DR_EACH
};

}  // namespace
}  // namespace diffratio
