// The state of a softmax over scores that arrive in parts: the largest score so far and the sum of
// exp(score - max). One definition for whoever merges parts, empty parts included.
#pragma once

#include <cmath>

#include "format.h"

namespace tq {

struct SoftmaxState {
  float max = -INFINITY;
  float sum = 0;

  // Take in a part. Returns what the numbers summed so far are to be multiplied by, and writes the
  // factor of the part's numbers to `part_factor`.
  TQ_HOST_DEVICE float merge(const SoftmaxState& part, float* part_factor) {
    const float largest = fmaxf(max, part.max);
    const float own = max == -INFINITY ? 0.0f : expf(max - largest);
    *part_factor = part.max == -INFINITY ? 0.0f : expf(part.max - largest);
    sum = sum * own + part.sum * *part_factor;
    max = largest;
    return own;
  }

  // One more score, with no value behind it.
  TQ_HOST_DEVICE float sink(float score) {
    float ignored;
    return merge({score, 1.0f}, &ignored);
  }

  // What turns the summed numbers into the result: 0 for a row that saw nothing.
  TQ_HOST_DEVICE float scale() const { return sum == 0 ? 0.0f : 1 / sum; }

  // log of the sum of the exponentials of all scores.
  TQ_HOST_DEVICE float lse() const { return sum == 0 ? -INFINITY : max + logf(sum); }
};

}  // namespace tq
