// SeedBlock, the host's seed bank. On the CPU the ops work on this very memory; for a GPU it is
// the mirror from which Python decides, so that no decision ever reads device memory.
// No torch header here: torch carries an older pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "seed_layout.h"

namespace py = pybind11;

namespace esper {
namespace {

#define X(name) {#name, static_cast<int>(SeedState::name)},
const std::map<std::string, int> kSeedStates{ESPER_SEED_STATES(X)};
#undef X
#define X(name) {#name, static_cast<int>(RampCurve::name)},
const std::map<std::string, int> kRampCurves{ESPER_RAMP_CURVES(X)};
#undef X

struct AlignedDelete {
  void operator()(unsigned char* block) const {
    ::operator delete(block, std::align_val_t{kSeedAlignment});
  }
};

int64_t checked_num_seeds(int64_t num_seeds) {
  if (num_seeds < 1 || num_seeds > kMaxSeeds) {
    throw py::value_error("num_seeds must lie in [1, " + std::to_string(kMaxSeeds) + "], got " +
                          std::to_string(num_seeds));
  }
  return num_seeds;
}

uint8_t checked_state(int64_t state) {
  const auto num_states = static_cast<int64_t>(kSeedStates.size());
  if (state < 0 || state >= num_states) {
    throw py::value_error("state must lie in [0, " + std::to_string(num_states - 1) + "], got " +
                          std::to_string(state));
  }
  return static_cast<uint8_t>(state);
}

class SeedBlock {
 public:
  explicit SeedBlock(int64_t num_seeds)
      : num_seeds_(checked_num_seeds(num_seeds)),
        block_(static_cast<unsigned char*>(
            ::operator new(static_cast<size_t>(nbytes()), std::align_val_t{kSeedAlignment}))),
        arrays_(seed_arrays(block_.get(), capacity())) {
    std::memset(block_.get(), 0, static_cast<size_t>(nbytes()));
  }

  int64_t num_seeds() const { return num_seeds_; }
  int64_t capacity() const { return seed_capacity(num_seeds_); }
  int64_t nbytes() const { return capacity() * kBytesPerSeed; }

  int state(int64_t index) const { return arrays_.lifecycle_states[checked_index(index)]; }

  void set_state(int64_t index, int64_t state) {
    arrays_.lifecycle_states[checked_index(index)] = checked_state(state);
  }

  int64_t count(int64_t state) const {
    const uint8_t* states = arrays_.lifecycle_states;
    return std::count(states, states + num_seeds_, checked_state(state));
  }

  py::dict fields() const {
    py::dict result;
    const auto add = [&](const char* name, const void* array, const char* dtype, int rows) {
      const auto offset = static_cast<const unsigned char*>(array) - block_.get();
      const py::tuple shape = rows == 1 ? py::tuple(py::make_tuple(capacity()))
                                        : py::tuple(py::make_tuple(rows, capacity()));
      result[name] = py::make_tuple(offset, dtype, shape);
    };
#define X(name, type, dtype, rows) add(#name, arrays_.name, dtype, rows);
    ESPER_SEED_FIELDS(X)
#undef X
    return result;
  }

  py::buffer_info buffer() const {
    return py::buffer_info(block_.get(), static_cast<py::ssize_t>(nbytes()));
  }

 private:
  int64_t checked_index(int64_t index) const {
    if (index < 0 || index >= num_seeds_) {
      throw py::index_error("seed index must lie in [0, " + std::to_string(num_seeds_ - 1) +
                            "], got " + std::to_string(index));
    }
    return index;
  }

  int64_t num_seeds_;
  std::unique_ptr<unsigned char, AlignedDelete> block_;
  SeedArrays arrays_;
};

}  // namespace
}  // namespace esper

PYBIND11_MODULE(_host, m) {
  using esper::SeedBlock;
  m.doc() = "The host's seed bank.";
  m.attr("SEED_STATES") = esper::kSeedStates;
  m.attr("RAMP_CURVES") = esper::kRampCurves;
  m.attr("BYTES_PER_SEED") = esper::kBytesPerSeed;
  m.attr("AUTOGRAD_TORCH") = ESPER_AUTOGRAD_TORCH;
  py::class_<SeedBlock>(m, "SeedBlock", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("num_seeds"))
      .def_property_readonly("num_seeds", &SeedBlock::num_seeds)
      .def_property_readonly("capacity", &SeedBlock::capacity)
      .def_property_readonly("nbytes", &SeedBlock::nbytes)
      .def("fields", &SeedBlock::fields)
      .def("state", &SeedBlock::state, py::arg("index"))
      .def("set_state", &SeedBlock::set_state, py::arg("index"), py::arg("state"))
      .def("count", &SeedBlock::count, py::arg("state"))
      .def_buffer(&SeedBlock::buffer);
}
