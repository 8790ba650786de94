// Counts and last times per pixel of a stream of events, behind one lock and without the interpreter's.
//
// A packet is added under the lock as a whole, so that a snapshot has all of it or nothing. A snapshot that clears
// exchanges the images for empty ones that were made before the lock was taken: the thread of the camera waits for the
// exchange of two pointers, and the old images become NumPy arrays without a copy. Argument checks that users meet are
// in evkernels/events/accumulator.py; here is what memory safety needs.

#include "host/event_accumulator.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "host/event_packet.h"

#define EVKERNELS_LOOPS "host/accumulator_loops.inl"
#include "common/foreach_isa.h"

namespace py = pybind11;

namespace evkernels {
namespace {

constexpr int64_t kNever = INT64_MIN;

IntType int_type(const py::array& column) {
  const char kind = column.dtype().kind();
  const int64_t size = column.itemsize();
  const bool is_native = column.dtype().byteorder() == '=' || column.dtype().byteorder() == '|';
  if (kind == 'b' && size == 1) return IntType::kUInt8;
  if ((kind == 'i' || kind == 'u') && is_native) {
    constexpr IntType kSigned[] = {IntType::kInt8, IntType::kInt16, IntType::kInt32, IntType::kInt64};
    constexpr IntType kUnsigned[] = {IntType::kUInt8, IntType::kUInt16, IntType::kUInt32, IntType::kUInt64};
    for (int k = 0; k < 4; ++k) {
      if (size == 1 << k) return kind == 'i' ? kSigned[k] : kUnsigned[k];
    }
  }
  throw py::type_error("columns must hold integers in native byte order");
}

PacketColumn packet_column(const py::array& column, int64_t count) {
  if (column.ndim() != 1 || column.shape(0) != count) throw std::invalid_argument("columns must be [E] each");
  return {static_cast<const char*>(column.data()), static_cast<int64_t>(column.strides(0)), int_type(column)};
}

// The images as they are handed over; a null pointer for what is not kept.
struct Images {
  std::unique_ptr<int64_t[]> times;
  std::unique_ptr<int32_t[]> counts;
};

template <class T>
py::object to_numpy(std::unique_ptr<T[]> values, const std::array<int64_t, 3>& shape) {
  if (!values) return py::none();
  const py::capsule owner(values.get(), [](void* pointer) { delete[] static_cast<T*>(pointer); });
  return py::array_t<T>(shape, values.release(), owner);
}

class Accumulator {
 public:
  Accumulator(int64_t height, int64_t width, int64_t polarities, bool times, bool counts, bool drop)
      : shape_{polarities, height, width}, drop_(drop), has_times_(times), has_counts_(counts) {
    if (height < 1 || width < 1 || height > INT32_MAX / width || (polarities != 1 && polarities != 2)) {
      throw std::invalid_argument("height, width and polarities must be those of a sensor");
    }
    images_ = empty_images();
  }

  // How many events were added; -1 if there are events out of range and they are not to be dropped.
  int64_t push(const py::array& x, const py::array& y, const py::array& t, const py::array& p) {
    const int64_t count = x.size();
    const EventPacket packet{packet_column(x, count), packet_column(y, count), packet_column(t, count),
                             packet_column(p, count), count};
    const py::gil_scoped_release release;
    if (!drop_ && !EVKERNELS_CALL(is_inside, packet, planes(Images{}))) return -1;
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t outside = EVKERNELS_CALL(add_events, packet, planes(images_));
    events_ += count - outside;
    dropped_ += outside;
    return count - outside;
  }

  // Counts, last times, and how many events were added and dropped since the images were last cleared.
  py::tuple snapshot(bool clear) {
    Images taken;
    int64_t events, dropped;
    {
      const py::gil_scoped_release release;
      taken = clear ? empty_images() : uninitialised_images();
      const std::lock_guard<std::mutex> lock(mutex_);
      events = events_;
      dropped = dropped_;
      if (clear) {
        std::swap(taken, images_);
        events_ = dropped_ = 0;
      } else {
        if (has_times_) std::copy_n(images_.times.get(), cells(), taken.times.get());
        if (has_counts_) std::copy_n(images_.counts.get(), cells(), taken.counts.get());
      }
    }
    py::object counts = to_numpy(std::move(taken.counts), shape_), times = to_numpy(std::move(taken.times), shape_);
    return py::make_tuple(counts, times, events, dropped);
  }

 private:
  int64_t cells() const { return shape_[0] * shape_[1] * shape_[2]; }

  EventPlanes planes(const Images& images) const {
    return {shape_[1], shape_[2], shape_[0], images.times.get(), images.counts.get()};
  }

  Images uninitialised_images() const {
    Images images;
    if (has_times_) images.times.reset(new int64_t[cells()]);
    if (has_counts_) images.counts.reset(new int32_t[cells()]);
    return images;
  }

  Images empty_images() const {
    Images images = uninitialised_images();
    if (has_times_) std::fill_n(images.times.get(), cells(), kNever);
    if (has_counts_) std::fill_n(images.counts.get(), cells(), 0);
    return images;
  }

  const std::array<int64_t, 3> shape_;  // polarities, height, width
  const bool drop_, has_times_, has_counts_;
  std::mutex mutex_;  // Of all that follows.
  Images images_;
  int64_t events_ = 0, dropped_ = 0;
};

}  // namespace

void bind_event_accumulator(py::module_& m) {
  py::class_<Accumulator>(m, "EventAccumulator", "See evkernels.events.EventAccumulator.")
      .def(py::init<int64_t, int64_t, int64_t, bool, bool, bool>(), py::arg("height"), py::arg("width"),
           py::arg("polarities"), py::arg("times"), py::arg("counts"), py::arg("drop"))
      .def("push", &Accumulator::push, py::arg("x").noconvert(), py::arg("y").noconvert(), py::arg("t").noconvert(),
           py::arg("p").noconvert())
      .def("snapshot", &Accumulator::snapshot, py::arg("clear"));
}

}  // namespace evkernels
