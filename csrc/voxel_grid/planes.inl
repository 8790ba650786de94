// The planes of a window while it is filled. Part of a loop file, see foreach_isa.h.
//
// Each plane is cleared right before its first event, while it fits into cache. Where many events come bin by bin, the
// two planes that they are between lie side by side, a pixel's two values next to each other: one cache line per event
// instead of two. They do so where the window's last two planes will be, so that no other memory is needed; whenever a
// plane is done it is copied to its own place, and the last two take theirs before their own events come.

// The bins [first, last) are this caller's to write.
struct Own {
  int64_t first, last;
};
EVKERNELS_INLINE bool owns(Own own, int64_t bin) { return bin >= own.first && bin < own.last; }

template <class R>
EVKERNELS_INLINE void clear_planes(R* window, const VoxelShape& shape, int64_t first_bin, int64_t last_bin) {
  const int64_t plane = shape.height * shape.width;
  for (int64_t half = 0; half < (shape.is_split ? 2 : 1); ++half)
    __builtin_memset(window + (half * shape.bins + first_bin) * plane, 0, (last_bin - first_bin) * plane * sizeof(R));
}

template <class R>
class Planes {
 public:
  // Paired planes need own.last - own.first >= 3, bins that never decrease, and not split ones.
  Planes(R* window, const VoxelShape& shape, Own own, bool is_paired)
      : window_(window),
        pair_(window + (own.last - 2) * shape.height * shape.width),
        shape_(shape),
        own_(own),
        lower_(own.first),
        cleared_(own.first),
        is_paired_(is_paired) {
    if (is_paired_) clear_planes(window_, shape_, own_.last - 2, own_.last);
  }

  // Call it before additions to the planes up to `bin`.
  void advance(int64_t bin) {
    const int64_t newest = bin < own_.last ? bin : own_.last - 1;
    while (is_paired_ && lower_ + 1 < newest) finish_lower();
    if (is_paired_ || cleared_ > newest) return;
    clear_planes(window_, shape_, cleared_, newest + 1);
    cleared_ = newest + 1;
  }

  // Whether the sums for both values of events between two planes of this caller are side by side, from &at(bin, k) on.
  bool is_paired() const { return is_paired_; }

  R& at(int64_t bin, int64_t pixel) const {
    return is_paired_ && bin >= lower_ ? pair_[2 * pixel + bin - lower_]
                                       : window_[bin * shape_.height * shape_.width + pixel];
  }

 private:
  void finish_lower() {
    const int64_t plane = shape_.height * shape_.width;
    R* __restrict__ const done = window_ + lower_ * plane;
    R* __restrict__ const pair = pair_;
    ++lower_;
    if (lower_ + 2 < own_.last) {
      for (int64_t k = 0; k < plane; ++k) {
        done[k] = pair[2 * k];
        pair[2 * k] = pair[2 * k + 1];
        pair[2 * k + 1] = 0;
      }
      return;
    }
    for (int64_t k = 0; k < plane; ++k) {
      done[k] = pair[2 * k];
      pair[k] = pair[2 * k + 1];
    }
    cleared_ = lower_ + 1;
    is_paired_ = false;
  }

  R* const window_;
  R* const pair_;
  const VoxelShape& shape_;
  const Own own_;
  int64_t lower_;    // of the paired planes
  int64_t cleared_;  // the first plane that is not, unless they are paired
  bool is_paired_;
};
