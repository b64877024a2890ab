// Runs one call on weights in compressed rows: rows_main FOLDER WHAT reads what emulate.py wrote there, and writes the
// result beside it.
#include <cuda_runtime.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "row_chain.h"
#include "row_products.h"
#include "sliced_products.h"

namespace {

std::string folder;

// Exactly as large as the file, so that reads past the end show.
template <typename T>
std::vector<T> read(const char* name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<T> result(bytes.size() / sizeof(T));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(result.data()));
  return result;
}

template <typename T>
void write(const char* name, const std::vector<T>& data) {
  std::ofstream(folder + "/" + name, std::ios::binary)
      .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size() * sizeof(T)));
}

int refuse(const char* what) { return std::fprintf(stderr, "%s\n", what), 2; }

std::vector<float> unset(int64_t size) { return std::vector<float>(static_cast<size_t>(size), NAN); }

}  // namespace

int main(int, char** arguments) {
  using namespace spdnn::cuda;
  folder = arguments[1];
  const std::string what = arguments[2];
  const auto sizes = read<int64_t>("sizes");
  const auto in = read<float>("in");
  const int64_t features = sizes[0];
  const bool sliced = what.rfind("sliced ", 0) == 0;  // whatever the rules for it say
  DeviceLimits limits;
  if (read_device_limits(&limits)) return 3;
  if (sliced || what == "product" || what == "sampled") {
    const auto indptr = read<int32_t>("indptr"), indices = read<int32_t>("indices");
    const CompressedRows rows{sizes[1], sizes[2], static_cast<int64_t>(indices.size()), indptr.data(), indices.data()};
    if (sliced && sliced_product_bytes(rows) == 0) return refuse("the rows cannot be cut");
    if (what == "sampled" || what == "sliced sampled") {
      const auto out = read<float>("gradient");
      const int64_t bytes = sliced ? sliced_sampled_bytes(rows, features) : sampled_workspace_bytes(rows, features);
      auto result = unset(rows.edges), workspace = unset(bytes / 4);
      const Sampled call{rows, features, in.data(), out.data(), workspace.data(), result.data()};
      if (sliced ? launch_sliced_sampled(call, nullptr) : launch_sampled(call, nullptr)) return 3;
      write("out", result);
      return 0;
    }
    const auto values = read<float>("values"), bias = read<float>("bias"), bounds = read<float>("bounds");
    auto result = unset(features * rows.out_width);
    Product product{};
    product.rows = rows;
    product.features = features;
    product.in = in.data();
    product.values = values.data();
    product.single_value = sizes[3] != 0;
    product.bias = bias.data();
    product.single_bias = sizes[4] != 0;
    product.lower = bounds[0];
    product.upper = bounds[1];
    product.out = result.data();
    auto workspace = unset((sliced ? sliced_product_bytes(rows) : product_workspace_bytes(rows, features)) / 4);
    product.workspace = workspace.data();
    auto in_mask = read<uint32_t>("in_mask"), out_mask = read<uint32_t>("out_mask");
    product.in_mask = {in_mask.empty() ? nullptr : in_mask.data(), (sizes[1] + 31) / 32};
    product.out_mask = {out_mask.empty() ? nullptr : out_mask.data(), (sizes[2] + 31) / 32};
    std::vector<uint32_t> inside(features * ((rows.out_width + 31) / 32));
    product.inside = {inside.data(), (rows.out_width + 31) / 32};
    if (sliced ? launch_sliced_product(product, limits, nullptr) : launch_product(product, nullptr)) return 3;
    write("out", result);
    write("masks", inside);
    return 0;
  }
  const auto records = read<int64_t>("records");
  const auto words = read<uint32_t>("words");
  ChainCall call;
  if (const char* wrong = spdnn::view_rows(records.data(), static_cast<int64_t>(records.size()),
                                           static_cast<int64_t>(words.size()), &call.rows)) {
    return refuse(wrong);
  }
  call.words = words.data();
  call.features = features;
  call.in = in.data();
  const bool transposed = what == "transposed";
  auto result = unset(features * (transposed ? call.rows.inputs() : call.rows.outputs()));
  auto workspace = unset(chain_workspace_bytes(call.rows, features) / 4);
  std::vector<uint32_t> masks(features * call.rows.mask_words());
  if (what != "chain") masks = read<uint32_t>("masks");
  call.out = result.data();
  call.masks = masks.data();
  call.workspace = reinterpret_cast<char*>(workspace.data());
  if (what == "chain" ? run_chain(call, nullptr) : run_chain_derivative(call, transposed, nullptr)) return 3;
  write("out", result);
  write("masks", masks);
  return 0;
}
