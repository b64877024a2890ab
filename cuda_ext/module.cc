// The Python module spdnn_jax._core: the layout's records, the simplifier, the plan builder, the reader of tables, and
// the CPU handlers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <signal.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "io/tsv.h"
#include "layout/plan_builder.h"
#include "layout/plan_check.h"
#include "layout/plan_rows.h"
#include "layout/simplify.h"
#include "layout/spdnn_layout.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

extern "C" {
XLA_FFI_Error* SpdnnNetworkCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SpdnnLayerCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SpdnnSampledCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SpdnnPermutedCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SpdnnChainCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* SpdnnChainDerivativeCpu(XLA_FFI_CallFrame* call_frame);
}

namespace spdnn {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Vector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

// A NumPy array that owns `data`.
template <typename T>
Vector<T> to_numpy(std::unique_ptr<T[]> data, size_t size) {
  T* pointer = data.release();
  nb::capsule owner(pointer, [](void* owned) noexcept { delete[] static_cast<T*>(owned); });
  return {pointer, {size}, owner};
}

using Fields = std::vector<std::pair<std::string, std::string>>;  // (name, NumPy type code)

template <typename T>
const char* type_code();
template <>
const char* type_code<int64_t>() {
  return "<i8";
}
template <>
const char* type_code<double>() {
  return "<f8";
}
template <>
const char* type_code<float>() {
  return "<f4";
}

#define SPDNN_DESCRIBE_FIELD(type, name) {#name, type_code<type>()},
Fields header_fields() { return {SPDNN_HEADER_FIELDS(SPDNN_DESCRIBE_FIELD)}; }
Fields layer_fields() { return {SPDNN_LAYER_FIELDS(SPDNN_DESCRIBE_FIELD)}; }
Fields run_fields() { return {SPDNN_RUN_FIELDS(SPDNN_DESCRIBE_FIELD)}; }
Fields rows_fields() { return {SPDNN_ROWS_FIELDS(SPDNN_DESCRIBE_FIELD)}; }

// Keeps the NumPy arrays of a layer until the builder, which runs without the GIL, is done with them.
std::shared_ptr<void> keep_alive(nb::object object) {
  PyObject* pointer = object.release().ptr();
  return std::shared_ptr<void>(pointer, [](void* kept) {
    nb::gil_scoped_acquire gil;
    Py_DECREF(static_cast<PyObject*>(kept));
  });
}

// A layer as the arrays of a SparseLayer. Throws where their lengths do not fit.
LayerArrays layer_arrays(int64_t inputs, const Array<int64_t>& indptr, const Array<int32_t>& indices,
                         const Array<float>& values, const Array<float>& bias, const ClipBounds& clip) {
  LayerArrays layer;
  layer.inputs = inputs;
  layer.clip = clip;
  if (indptr.shape(0) == 0) throw std::invalid_argument("indptr must hold outputs + 1 entries");
  layer.outputs = static_cast<int64_t>(indptr.shape(0)) - 1;
  layer.indptr = indptr.data();
  layer.indices = indices.data();
  layer.values = values.data();
  layer.value_count = static_cast<int64_t>(values.shape(0));
  layer.bias = bias.data();
  layer.bias_count = static_cast<int64_t>(bias.shape(0));
  const int64_t edges = static_cast<int64_t>(indices.shape(0));
  if (layer.edges() != edges) throw std::invalid_argument("the last entry of indptr must be the number of edges");
  if (layer.value_count != edges && layer.value_count != 1) {
    throw std::invalid_argument("values must hold one entry, or one for each edge");
  }
  if (layer.bias_count != layer.outputs && layer.bias_count != 1) {
    throw std::invalid_argument("bias must hold one entry, or one for each output neuron");
  }
  return layer;
}

void add_to_plan(PlanBuilder& builder, int64_t inputs, Array<int64_t> indptr, Array<int32_t> indices,
                 Array<float> values, Array<float> bias, float lower, float upper, const LayerOrigin* origin) {
  const LayerArrays layer = layer_arrays(inputs, indptr, indices, values, bias, {lower, upper});
  LayerOrigin as_it_is;
  as_it_is.edges = layer.edges();
  std::shared_ptr<void> owner = keep_alive(nb::make_tuple(indptr, indices, values, bias));
  nb::gil_scoped_release no_gil;
  builder.add(layer, origin ? *origin : as_it_is, std::move(owner));
}

void add_to_simplifier(Simplifier& simplifier, int64_t inputs, Array<int64_t> indptr, Array<int32_t> indices,
                       Array<float> values, Array<float> bias, float lower, float upper) {
  const LayerArrays layer = layer_arrays(inputs, indptr, indices, values, bias, {lower, upper});
  nb::gil_scoped_release no_gil;
  simplifier.add(layer);
}

// A NumPy array that owns the vector.
template <typename T>
Vector<T> to_numpy(std::vector<T> vector) {
  auto* kept = new std::vector<T>(std::move(vector));
  nb::capsule owner(kept, [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
  return {kept->data(), {kept->size()}, owner};
}

nb::object take_simplified(Simplifier& simplifier) {
  if (simplifier.empty()) return nb::none();
  SimplifiedLayer layer = simplifier.take();
  return nb::make_tuple(layer.inputs, to_numpy(std::move(layer.indptr)), to_numpy(std::move(layer.indices)),
                        to_numpy(std::move(layer.values)), to_numpy(std::move(layer.bias)), layer.origin);
}

Vector<uint32_t> finish(PlanBuilder& builder, std::optional<Array<int32_t>> expansion, bool merge_features) {
  Simplification simplification;
  simplification.neurons = expansion.has_value();
  if (expansion) simplification.expansion.assign(expansion->data(), expansion->data() + expansion->shape(0));
  simplification.features = merge_features;
  uint32_t* plan = nullptr;
  size_t words = 0;
  {
    nb::gil_scoped_release no_gil;
    words = static_cast<size_t>(builder.finish(simplification));
    plan = new uint32_t[words];
    builder.write(plan);
  }
  return to_numpy(std::unique_ptr<uint32_t[]>(plan), words);
}

void check_plan_contents(Array<int64_t> records, Array<uint32_t> words) {
  std::string wrong;
  {
    nb::gil_scoped_release no_gil;
    wrong = check_contents(records.data(), static_cast<int64_t>(records.shape(0)), words.data(),
                           static_cast<int64_t>(words.shape(0)));
  }
  if (!wrong.empty()) throw std::invalid_argument(wrong);
}

void check_plan_records(Array<int64_t> records, int64_t words) {
  PlanView plan;
  const std::string wrong = check_records(records.data(), static_cast<int64_t>(records.shape(0)), words, &plan);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
}

// The rows of a plan, whose words may have been changed: their records, as 64-bit words, and their words.
std::pair<Vector<int64_t>, Vector<uint32_t>> plan_rows(Array<int64_t> records, Array<uint32_t> words) {
  check_plan_contents(records, words);
  PlanView plan;
  view_plan(records.data(), static_cast<int64_t>(records.shape(0)), &plan);
  PlanRows rows;
  {
    nb::gil_scoped_release no_gil;
    rows = build_rows(plan, words.data());
  }
  const int64_t* first = reinterpret_cast<const int64_t*>(rows.layers.data());
  const size_t count = rows.layers.size() * sizeof(RowsLayer) / sizeof(int64_t);
  return {to_numpy(std::vector<int64_t>(first, first + count)), to_numpy(std::move(rows.words))};
}

std::tuple<Vector<int32_t>, Vector<int32_t>, Vector<float>, int64_t> parse_table(Array<uint8_t> text, int threads) {
  TsvTable table;
  {
    nb::gil_scoped_release no_gil;
    table = parse_tsv(reinterpret_cast<const char*>(text.data()), static_cast<int64_t>(text.shape(0)), threads);
  }
  const size_t rows = static_cast<size_t>(table.rows);
  return {to_numpy(std::move(table.first), rows), to_numpy(std::move(table.second), rows),
          to_numpy(std::move(table.third), rows), table.bytes};
}

// Where the process aborts, it says this there, and exits with 1.
struct LastWords {
  int descriptor = 2;
  std::string text;
};

LastWords last_words;

void say_last_words(int) {
  const ssize_t written = write(last_words.descriptor, last_words.text.data(), last_words.text.size());
  _exit(written < 0 ? 2 : 1);
}

void end_on_abort(int descriptor, const std::string& text) {
  signal(SIGABRT, SIG_DFL);  // not while the text changes
  last_words = {descriptor, text};
  signal(SIGABRT, say_last_words);
}

}  // namespace
}  // namespace spdnn

NB_MODULE(_core, module) {
  using namespace spdnn;
  module.doc() = "Native core of spdnn_jax: plan layout, simplifier, plan builder, table reader, CPU back end.";
  module.attr("PLAN_VERSION") = kPlanVersion;
  module.attr("SLICE_GROUPS") = kSliceGroups;
  module.attr("EDGE_CHUNK") = kEdgeChunk;
  module.attr("STAGED_ROWS") = kStagedRows;
  module.attr("STAGED_INPUTS") = kStagedInputs;
  module.attr("MASK_BITS") = kMaskBits;
  module.attr("WORD_ALIGNMENT") = spdnn::kWordAlignment;
  module.def("header_fields", &header_fields);
  module.def("layer_fields", &layer_fields);
  module.def("run_fields", &run_fields);
  module.def("rows_fields", &rows_fields);
  module.def("build_rows", &plan_rows, nb::arg("records"), nb::arg("words"));
  module.def("check_plan", &check_plan_contents, nb::arg("records"), nb::arg("words"));
  module.def("check_plan_records", &check_plan_records, nb::arg("records"), nb::arg("words"));
  module.def("parse_table", &parse_table, nb::arg("text"), nb::arg("threads"));
  module.def("end_on_abort", &end_on_abort, nb::arg("descriptor"), nb::arg("text"));
  module.def("ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  module.def("handlers", [] {
    nb::dict handlers;
    handlers["spdnn_network"] = nb::capsule(reinterpret_cast<void*>(&SpdnnNetworkCpu));
    handlers["spdnn_layer"] = nb::capsule(reinterpret_cast<void*>(&SpdnnLayerCpu));
    handlers["spdnn_sampled"] = nb::capsule(reinterpret_cast<void*>(&SpdnnSampledCpu));
    handlers["spdnn_permuted"] = nb::capsule(reinterpret_cast<void*>(&SpdnnPermutedCpu));
    handlers["spdnn_chain"] = nb::capsule(reinterpret_cast<void*>(&SpdnnChainCpu));
    handlers["spdnn_chain_derivative"] = nb::capsule(reinterpret_cast<void*>(&SpdnnChainDerivativeCpu));
    return handlers;
  });
  nb::class_<PlanBuilder>(module, "PlanBuilder")
      .def(
          "__init__",
          [](PlanBuilder* builder, int threads, double staged_below, int64_t staged_wider_than, double single_below) {
            new (builder) PlanBuilder(threads, LayoutRule{staged_below, staged_wider_than, single_below});
          },
          nb::arg("threads"), nb::arg("staged_below"), nb::arg("staged_wider_than"), nb::arg("single_below"))
      .def("add", &add_to_plan, nb::arg("inputs"), nb::arg("indptr"), nb::arg("indices"), nb::arg("values"),
           nb::arg("bias"), nb::arg("lower"), nb::arg("upper"), nb::arg("origin").none() = nb::none())
      .def("finish", &finish, nb::arg("expansion").none() = nb::none(), nb::arg("merge_features") = false);
  nb::class_<LayerOrigin>(module, "LayerOrigin")
      .def_ro("edges", &LayerOrigin::edges)
      .def_ro("merged", &LayerOrigin::merged)
      .def_ro("constant", &LayerOrigin::constant)
      .def_ro("unread", &LayerOrigin::unread);
  nb::class_<Simplifier>(module, "Simplifier")
      .def(nb::init<int, uint64_t>(), nb::arg("threads"), nb::arg("hash_mask"))
      .def("add", &add_to_simplifier, nb::arg("inputs"), nb::arg("indptr"), nb::arg("indices"), nb::arg("values"),
           nb::arg("bias"), nb::arg("lower"), nb::arg("upper"))
      .def("finish", &Simplifier::finish, nb::call_guard<nb::gil_scoped_release>())
      .def("take", &take_simplified)
      .def("expansion", [](const Simplifier& simplifier) { return to_numpy(simplifier.expansion()); });
}
