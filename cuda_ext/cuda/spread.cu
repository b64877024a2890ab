#include <algorithm>
#include <climits>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "resident_block.cuh"
#include "spread.h"
#include "warp.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kSliceBits = 5;
static_assert(1 << kSliceBits == kSliceGroups);
constexpr int kWarps = 16;  // that compute, and one more that speaks for all
constexpr int kThreads = 32 * (kWarps + 1);
constexpr int kComputing = 32 * kWarps;
template <bool kInShared>
constexpr int kMostOfGroup = kInShared ? 8 : 4;  // features of a group
constexpr int kInFlight = 64;                    // features at work at a time: what exchange buffers have room for
constexpr int kMostBlocks = 256;                 // of a group
constexpr int kBuffers = 3;                      // one is read, one is written, and one is made ready to be written
constexpr int kMostLaneBits = 3;     // of the lanes that share an output's edges: 4 outputs of a warp lie side by side
constexpr int kMostWarpBits = 4;     // of the warps that do: all of a block
constexpr int kLeastEdges = 8;       // of an output, of a lane: it pays to share more
constexpr int64_t kLanes = 1 << 17;  // that a layer had better have work for: twice an H100's

// --- how blocks exchange a layer's outputs ---

__device__ __forceinline__ bool is_missing(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)) == kUnwritten; }
__device__ __forceinline__ bool is_missing(uint32_t v) { return v == kUnwritten; }

// Waits until other blocks have written all of `values`, which it loads. All that are missing are asked for at a time:
// a look takes as long as the way to L2 and back.
template <int kStride, int kCount, typename T>
__device__ __forceinline__ void wait_for(const T* source, const T* end, T (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = source + k * kStride < end ? load_coherent(source + k * kStride) : T{};
  const auto some_are_missing = [&] {
    bool missing = false;
#pragma unroll
    for (int k = 0; k < kCount; ++k) missing |= is_missing(values[k]);
    return missing;
  };
  for (int tries = 1; some_are_missing(); ++tries) {
    pause(tries);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (is_missing(values[k])) values[k] = load_coherent(source + k * kStride);
    }
  }
}

// The buffers of a group of features, [neuron][feature], and behind these a word for each block. A block waits for one
// buffer, all of it, before it writes the next one; and when it needs the first no more, it clears its share of the one
// before that and writes its word in the next. So who has waited for a buffer knows that all are through with the one
// before, and that the one after is clear.
struct Exchange {
  uint32_t* buffers;
  const int64_t& words;  // of a buffer
  int turn = -1;         // exchanges so far: the buffer to be read; the first one is yet to be written

  __device__ uint32_t* buffer(int turn) const { return buffers + turn % kBuffers * words; }
  __device__ const uint32_t* source() const { return buffer(turn); }
  __device__ uint32_t* target() const { return buffer(turn + 1); }
  __device__ uint32_t* arrivals(int turn) const { return buffer(turn) + (words - kMostBlocks); }

  // Clears this block's share of the buffer before the source, and says that it needs the source no more. For one warp
  // to do, after a barrier.
  __device__ void move_on() const {
    float* old = reinterpret_cast<float*>(buffer(turn + 2));
    const float none = __uint_as_float(kUnwritten), four[4] = {none, none, none, none};
    for (int64_t k = blockIdx.x * 32 + threadIdx.x % 32; k < words / 4; k += gridDim.x * 32) {
      store_coherent(old + 4 * k, four);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive();
  }

  __device__ void arrive() const { store_after_all(arrivals(turn + 1) + blockIdx.x, 1u); }

  // Waits for the words of all blocks. For one warp to do.
  __device__ void meet_others() const {
    const uint32_t* words = arrivals(turn);
    uint32_t arrived[kMostBlocks / 32];
    wait_for<32>(words + threadIdx.x % 32, words + gridDim.x, arrived);
  }
};

// A bit for each of the features of a group that some word of a vector is not zero for. Vectors lie behind one another:
// `odd` ones begin with the features' second half.
template <int kFeatures>
__device__ __forceinline__ uint32_t active_bits(const uint4& v, bool odd) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) bits |= static_cast<uint32_t>((words[k] << 1) != 0) << k % kFeatures;  // -0.0 is zero
  return kFeatures == 8 && odd ? bits << 4 : bits;
}

// Waits for a layer's inputs, of so many words; and copies them into shared memory, if they are to be there. Returns a
// bit for each feature that this thread has seen active. For all warps to do that compute.
template <int kFeatures, bool kInShared>
__device__ __forceinline__ uint32_t receive(const Exchange& exchange, int64_t words, float* x) {
  const int64_t vectors = words / 4;
  const uint4* source = reinterpret_cast<const uint4*>(exchange.source());
  const uint4* end = source + vectors;
  uint4* target = reinterpret_cast<uint4*>(x) + threadIdx.x;
  const bool odd = threadIdx.x % 2;
  constexpr int kPoll = kInShared ? 3 : 2;  // loads on their way to a thread
  uint32_t active = 0;
  for (source += threadIdx.x; source < end; source += kPoll * kComputing, target += kPoll * kComputing) {
    uint4 v[kPoll];
    wait_for<kComputing>(source, end, v);
#pragma unroll
    for (int k = 0; k < kPoll; ++k) {
      if (source + k * kComputing >= end) break;
      if constexpr (kInShared) target[k * kComputing] = v[k];
      active |= active_bits<kFeatures>(v[k], odd);
    }
  }
  const uint32_t* rest = exchange.source() + vectors * 4;  // nothing where a group has four features or more
  if (threadIdx.x < words % 4) {
    uint32_t value[1];
    wait_for<1>(rest + threadIdx.x, rest + words % 4, value);
    if constexpr (kInShared) x[vectors * 4 + threadIdx.x] = __uint_as_float(value[0]);
    active |= static_cast<uint32_t>((value[0] << 1) != 0) << threadIdx.x % kFeatures;
  }
  return active;
}

// --- what a layer has, and who computes it ---

constexpr int kRecords = 3;     // layers: the one in work and the next, and one on its way
constexpr int kRunsAhead = 32;  // records of a layer's runs that are brought along

// The records of a layer, in shared memory before a block comes to it.
struct alignas(16) LayerRecords {
  PlanLayer layer;
  PlanRun runs[kRunsAhead];
};

// Asks for a layer's records. For one warp to do.
__device__ void bring_records(const ResidentStep& step, int l, LayerRecords& records) {
  const PlanLayer* layer = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word) + l;
  const int64_t first_run = __ldg(&layer->first_run);
  const PlanRun* runs = reinterpret_cast<const PlanRun*>(step.words + step.runs_word) + first_run;
  const auto copy = [](auto* target, const auto* source, int64_t count) {
    const int64_t fields = count * static_cast<int64_t>(sizeof *source / sizeof(int64_t));
    for (int64_t field = threadIdx.x % 32; field < fields; field += 32) {
      copy_async<8>(reinterpret_cast<int64_t*>(target) + field, reinterpret_cast<const int64_t*>(source) + field);
    }
  };
  copy(&records.layer, layer, 1);
  copy(records.runs, runs, min(static_cast<int64_t>(kRunsAhead), step.runs - first_run));
  close_copies();
}

// Lanes and warps that share an output's edges, by the layer alone: sums do not depend on the card.
struct Sharing {
  int lane_bits, warp_bits;

  __device__ static Sharing of(const PlanLayer& layer) {
    const int64_t outputs = layer.outputs, edges = layer.multiplied_edges, least = kLeastEdges * outputs;
    int bits = 0;
    while (bits < kMostLaneBits + kMostWarpBits && outputs << bits < kLanes && edges >> bits > least) ++bits;
    const int lane_bits = min(bits, kMostLaneBits);
    return {lane_bits, bits - lane_bits};
  }

  __device__ int unit_bits() const { return 5 - lane_bits; }  // of a warp's outputs
  __device__ int warps() const { return 1 << warp_bits; }     // of a team
  __device__ int teams() const { return kWarps >> warp_bits; }
};

// Finds the units of a layer: outputs that lie side by side in a slice, a power of two.
class Units {
 public:
  __device__ Units(const ResidentStep& step, const LayerRecords& records, int unit_bits)
      : step_(step), records_(records), count_(static_cast<int>(records.layer.runs)), unit_bits_(unit_bits) {}

  // Moves on to a unit, which must not lie before the last one. False: there are no so many.
  __device__ bool find(int unit) {
    while (unit >= before_ + total_) {
      if (next_ >= count_) return false;
      look_at_more();
    }
    const int run = __popc(__ballot_sync(0xFFFFFFFFu, before_ + ends_ <= unit));
    const int begin = run == 0 ? 0 : __shfl_sync(0xFFFFFFFFu, ends_, run - 1);
    run_ = run_number(next_ - 32 + run);
    unit_ = unit - before_ - begin;
    return true;
  }

  // Of all units, after `find` said that there are no more.
  __device__ int count() const { return before_ + total_; }
  __device__ const PlanRun* run() const { return run_; }
  __device__ int64_t first_output() const { return static_cast<int64_t>(unit_) << unit_bits_; }  // inside the run

 private:
  __device__ void look_at_more() {
    const int lane = threadIdx.x % 32;
    before_ += total_;
    int units = 0;
    if (next_ + lane < count_) {
      const PlanRun* run = run_number(next_ + lane);
      units = static_cast<int>((run->groups * run->group_outputs + (1 << unit_bits_) - 1) >> unit_bits_);
    }
    ends_ = sum_until(units);
    total_ = __shfl_sync(0xFFFFFFFFu, ends_, 31);
    next_ += 32;
  }

  __device__ const PlanRun* run_number(int run) const {
    if (run < kRunsAhead) return &records_.runs[run];
    return reinterpret_cast<const PlanRun*>(step_.words + step_.runs_word) + records_.layer.first_run + run;
  }

  const ResidentStep& step_;
  const LayerRecords& records_;
  int count_, unit_bits_;
  int next_ = 0;                // run
  int before_ = 0, total_ = 0;  // units of the runs before those looked at, and of these
  int ends_ = 0;                // of the lane's run
  const PlanRun* run_ = nullptr;
  int unit_ = 0;  // of the run
};

// A lane's part of a unit.
struct Place {
  int group_bits;  // of the outputs of a group
  int bits;        // of the unit's outputs
  int outputs;     // of which there may be fewer; lanes too many do as the last does
  int output;      // the lane's, in the unit
  int part;        // of the output's edges ...
  int part_bits;   // ... of so many
  int slice, width, group;
  int output_of_group;

  __device__ Place(const PlanRun& run, int64_t first_output, const Sharing& sharing, int member) {
    group_bits = 31 - __clz(static_cast<int>(run.group_outputs));
    const int lane = threadIdx.x % 32, slice_bits = kSliceBits + group_bits;
    slice = static_cast<int>(first_output >> slice_bits) << kSliceBits;
    width = min(kSliceGroups, static_cast<int>(run.groups) - slice);
    const int first = static_cast<int>(first_output) & ((1 << slice_bits) - 1);
    outputs = min(1 << sharing.unit_bits(), (width << group_bits) - first);
    bits = outputs > 1 ? 32 - __clz(outputs - 1) : 0;
    output = min(lane & ((1 << bits) - 1), outputs - 1);
    part = (lane >> bits) + (member << (5 - bits));
    part_bits = 5 - bits + sharing.warp_bits;
    group = (first + output) >> group_bits;
    output_of_group = (first + output) & ((1 << group_bits) - 1);
  }

  __device__ int64_t slot(const PlanRun& run) const {
    return run.first_slot + (static_cast<int64_t>(slice) << group_bits) + output_of_group * width + group;
  }
  __device__ bool is_first_part() const { return threadIdx.x % 32 < outputs; }  // of the warp's
};

// --- sums ---

template <int kFeatures>
inline constexpr int kVector = kFeatures < 4 ? kFeatures : 4;

template <int kFeatures>
__device__ __forceinline__ void load_features(const float* address, float (&x)[kFeatures]) {
#pragma unroll
  for (int v = 0; v < kFeatures; v += kVector<kFeatures>) {
    load_vector<kVector<kFeatures>>(address + v, reinterpret_cast<float (&)[kVector<kFeatures>]>(x[v]));
  }
}

enum class Values { kOne, kAlone, kShared };  // one for all edges; of outputs by themselves; of groups

// Four edges of a lane's output.
template <typename Index>
struct Chunk {
  IndexChunk<Index> indices;
  float4 values;
};

// Where a lane's edges lie.
template <Values kValues, typename Index>
struct Edges {
  const IndexChunk<Index>* indices;
  const float* values;
  int stride;  // of chunks
  int group_outputs;
  float value;
  int left;  // chunks

  __device__ Edges(const uint32_t* words, const PlanRun& run, const Place& place)
      : stride(place.width << place.part_bits),
        group_outputs(static_cast<int>(run.group_outputs)),
        value(static_cast<float>(run.value)) {
    const int chunks = static_cast<int>(run.edges / kEdgeChunk);
    const int64_t first = static_cast<int64_t>(place.slice) * chunks + place.part * place.width + place.group;
    indices = reinterpret_cast<const IndexChunk<Index>*>(words + run.index_offset) + first;
    values = kValues == Values::kOne ? nullptr
                                     : reinterpret_cast<const float*>(words + run.value_offset) +
                                           first * kEdgeChunk * group_outputs + place.output_of_group;
    left = (chunks - place.part + (1 << place.part_bits) - 1) >> place.part_bits;
  }

  __device__ __forceinline__ void load(Chunk<Index>& chunk) {
    chunk.indices = __ldg(indices);
    indices += stride;
    if constexpr (kValues == Values::kAlone) {
      chunk.values = __ldg(reinterpret_cast<const float4*>(values));
      values += stride * kEdgeChunk;
    } else if constexpr (kValues == Values::kShared) {
      chunk.values = make_float4(__ldg(values), __ldg(values + group_outputs), __ldg(values + 2 * group_outputs),
                                 __ldg(values + 3 * group_outputs));
      values += stride * kEdgeChunk * group_outputs;
    } else {
      chunk.values = make_float4(value, value, value, value);
    }
  }
};

template <int kFeatures, typename Index>
__device__ __forceinline__ void multiply(const Chunk<Index>& chunk, const float* x, float (&sums)[kFeatures]) {
  const float weights[kEdgeChunk] = {chunk.values.x, chunk.values.y, chunk.values.z, chunk.values.w};
  float inputs[kEdgeChunk][kFeatures];
#pragma unroll
  for (int edge = 0; edge < kEdgeChunk; ++edge) {
    load_features<kFeatures>(x + static_cast<int64_t>(index_of(chunk.indices, edge)) * kFeatures, inputs[edge]);
  }
#pragma unroll
  for (int edge = 0; edge < kEdgeChunk; ++edge) {
#pragma unroll
    for (int v = 0; v < kFeatures; ++v) sums[v] = fmaf(weights[edge], inputs[edge][v], sums[v]);
  }
}

// Adds a lane's edges to its sums. The first are asked for before `ready` waits for the inputs.
template <int kFeatures, int kAhead, Values kValues, typename Index, typename Ready>
__device__ __forceinline__ void add_edges(const uint32_t* words, const PlanRun& run, const Place& place, const float* x,
                                          const Ready& ready, float (&sums)[kFeatures]) {
  Edges<kValues, Index> edges(words, run, place);
  Chunk<Index> chunks[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    if (k < edges.left) edges.load(chunks[k]);
  }
  ready();
#pragma unroll 1
  for (int left = edges.left; left > 0; left -= kAhead) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k >= left) break;
      multiply<kFeatures>(chunks[k], x, sums);
      if (k + kAhead < left) edges.load(chunks[k]);
    }
  }
}

// --- the kernel ---

// What blocks have in shared memory beside a layer's inputs, which stand behind it.
struct alignas(16) SpreadState {
  float partial[kWarps][32 >> kMostLaneBits][kMostOfGroup<true>];  // sums of warps that share edges
  LayerRecords records[kRecords];
  uint32_t active[2];  // a bit for each feature that is not all zero; of an exchange, and of the next
};

template <int kFeatures, bool kInShared>
class Spread {
 public:
  __device__ Spread(const ResidentStep& step, const SpreadRoom& room, uint32_t* exchange, char* shared)
      : step_(step),
        state_(*reinterpret_cast<SpreadState*>(shared)),
        x_(reinterpret_cast<float*>(shared + sizeof(SpreadState))),
        exchange_{exchange + blockIdx.y * kBuffers * room.buffer_words, room.buffer_words} {
    if (threadIdx.x < 2) state_.active[threadIdx.x] = 0;
  }

  // Runs the features of a group, from `first` on, through all layers.
  __device__ void run(int64_t first) {
    first_ = first;
    bring_input();
    for (int l = 0; l < step_.end_layer; ++l) {
      if (is_speaker()) {
        attend_layer(l);
      } else {
        run_layer(l);
      }
    }
    get_outputs(step_.end_layer - 1);
    store_results();
  }

 private:
  __device__ static bool is_speaker() { return threadIdx.x >= kComputing; }

  __device__ LayerRecords& records(int l) const { return state_.records[l % kRecords]; }

  // Into shared memory; or into the first buffer, as if a layer had computed it, so that nobody reads rows and converts
  // numbers time and again.
  __device__ void bring_input() {
    meet_from_anywhere<kThreads>();  // all are through with the group before
    if (is_speaker()) {
      for (int l = 0; l < min(kRecords, step_.end_layer); ++l) bring_records(step_, l, records(l));
    }
    if constexpr (kInShared) {
      const Columns columns{kFeatures == 8 ? 3 : kFeatures / 2};
      load_rows(step_.input, first_, step_.features, columns, Activations<1>(x_, columns));
    } else {
      const int column = threadIdx.x % kFeatures;
      const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads / kFeatures;
      int64_t neuron = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kFeatures;
      for (; neuron < step_.input.inputs; neuron += stride) {
        const bool present = first_ + column < step_.features;
        const float value = present ? feature_at(step_.input, first_ + column, neuron) : 0.0f;
        const uint32_t word = __float_as_uint(value);  // of NaNs, another one
        store_coherent(exchange_.target() + neuron * kFeatures + column, word == kUnwritten ? kUnwritten >> 1 : word);
      }
    }
    if (is_speaker()) finish_copies<0>();
    meet_from_anywhere<kThreads>();
    if (exchange_.turn < 0 && threadIdx.x == kComputing) exchange_.arrive();
  }

  // Waits for the outputs of layer l, or for the input where l is -1, and takes them for the next layer's inputs. For
  // all threads to do.
  __device__ __forceinline__ void get_outputs(int l) {
    if (is_speaker()) finish_copies<0>();
    meet_from_anywhere<kThreads>();  // all are through with the inputs before
    if (!kInShared && exchange_.turn >= 0 && is_speaker()) exchange_.move_on();
    ++exchange_.turn;
    if (is_speaker()) {
      exchange_.meet_others();
    } else {
      const int64_t width = l < 0 ? step_.input.inputs : records(l).layer.outputs;
      const uint32_t active = receive<kFeatures, kInShared>(exchange_, width * kFeatures, x_);
      if (blockIdx.x == 0) note_active(active);
    }
    if constexpr (!kInShared) __threadfence();  // what L1 holds of the buffer is old
    meet_from_anywhere<kThreads>();
    if (!is_speaker()) return;
    if constexpr (kInShared) exchange_.move_on();  // what was copied is read no more
    if (blockIdx.x == 0 && threadIdx.x == kComputing) count_active(l);
    if (l >= 0 && l + kRecords < step_.end_layer) bring_records(step_, l + kRecords, records(l));
  }

  __device__ uint32_t* active_word(int turn) const { return &state_.active[turn % 2]; }

  __device__ void note_active(uint32_t active) const {
    active = __reduce_or_sync(0xFFFFFFFFu, active);
    if (threadIdx.x % 32 == 0 && active) atomicOr(active_word(exchange_.turn), active);
  }

  // Counts the features that are active after layer l, and says so of each after the last.
  __device__ void count_active(int l) const {
    *active_word(exchange_.turn + 1) = 0;
    if (l < 0) return;
    const int64_t present = min(static_cast<int64_t>(kFeatures), step_.features - first_);
    const uint32_t active = *active_word(exchange_.turn) & ((1u << present) - 1);
    if (step_.active && active) atomicAdd(step_.active + l, __popc(active));
    if (l + 1 == step_.end_layer) {
      for (int column = 0; column < present; ++column) step_.alive[first_ + column] = active >> column & 1u;
    }
  }

  __device__ const float* inputs() const { return kInShared ? x_ : reinterpret_cast<const float*>(exchange_.source()); }

  __device__ bool waits_before(int l) const { return l > 0 || !kInShared; }

  // The speaker's part in a layer.
  __device__ void attend_layer(int l) {
    if (waits_before(l)) get_outputs(l - 1);
    const Sharing sharing = Sharing::of(records(l).layer);
    if (sharing.warp_bits == 0) return;
    Units units(step_, records(l), sharing.unit_bits());
    units.find(INT_MAX);
    const int stride = static_cast<int>(gridDim.x) * sharing.teams();
    for (int first = static_cast<int>(blockIdx.x); first < units.count(); first += stride) meet_team();
  }

  // Teams meet before their sums are added up, and after it; all of them, as all have as many units or one more.
  __device__ static void meet_team() {
    meet_from_anywhere<kThreads>();
    meet_from_anywhere<kThreads>();
  }

  __device__ void run_layer(int l) {
    const PlanLayer& layer = records(l).layer;
    const Sharing sharing = Sharing::of(layer);
    const int team = threadIdx.x / 32 >> sharing.warp_bits, member = threadIdx.x / 32 & (sharing.warps() - 1);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    Units units(step_, records(l), sharing.unit_bits());
    bool waits = waits_before(l);
    const auto ready = [&] {
      if (waits) get_outputs(l - 1);
      waits = false;
    };
    // Teams take units in turn, so that all blocks get some before one gets two.
    for (int first = block;; first += blocks * sharing.teams()) {
      const bool found = units.find(first + blocks * team);
      if (!found) {
        ready();
        if (sharing.warp_bits == 0 || first >= units.count()) return;
        meet_team();
        continue;
      }
      const PlanRun run = *units.run();
      const Place place(run, units.first_output(), sharing, member);
      const int64_t slot = place.slot(run);
      float sums[kFeatures];
      start_sums(layer, slot, place.part == 0, sums);
      if constexpr (kInShared) {
        add_run(layer, run, place, ready, sums);
      } else {  // layers so wide have so many edges that nothing is gained from the first of them
        ready();
        add_run(layer, run, place, [] {}, sums);
      }
      for (int other = 1 << place.bits; other < 32; other *= 2) {
#pragma unroll
        for (int v = 0; v < kFeatures; ++v) sums[v] += __shfl_xor_sync(0xFFFFFFFFu, sums[v], other);
      }
      if (sharing.warp_bits > 0) add_partial_sums(place, member, sharing.warps(), sums);
      if (member > 0 || !place.is_first_part()) continue;
      step_.scale.bounds(layer).clip(sums);
      store_coherent(reinterpret_cast<float*>(exchange_.target()) + slot * kFeatures, sums);
    }
  }

  __device__ __forceinline__ void start_sums(const PlanLayer& layer, int64_t slot, bool with_bias,
                                             float (&sums)[kFeatures]) const {
    float start = 0;
    if (with_bias) {
      const float bias = layer.bias_offset < 0
                             ? static_cast<float>(layer.bias)
                             : __ldg(reinterpret_cast<const float*>(step_.words + layer.bias_offset) + slot);
      start = bias * step_.scale.per_unit;
    }
#pragma unroll
    for (int v = 0; v < kFeatures; ++v) sums[v] = start;
  }

  template <typename Ready>
  __device__ __forceinline__ void add_run(const PlanLayer& layer, const PlanRun& run, const Place& place,
                                          const Ready& ready, float (&sums)[kFeatures]) const {
    if (kInShared || layer.index_bits == 16) {  // more inputs than 16 bits name do not fit into shared memory
      add_run_of<uint16_t>(run, place, ready, sums);
    } else {
      add_run_of<uint32_t>(run, place, ready, sums);
    }
  }

  template <typename Index, typename Ready>
  __device__ __forceinline__ void add_run_of(const PlanRun& run, const Place& place, const Ready& ready,
                                             float (&sums)[kFeatures]) const {
    if (run.value_offset < 0) {
      add_edges<kFeatures, kAhead, Values::kOne, Index>(step_.words, run, place, inputs(), ready, sums);
    } else if (run.group_outputs == 1) {
      add_edges<kFeatures, kAhead, Values::kAlone, Index>(step_.words, run, place, inputs(), ready, sums);
    } else {
      add_edges<kFeatures, kAhead, Values::kShared, Index>(step_.words, run, place, inputs(), ready, sums);
    }
  }

  // Adds up what the warps of a team have, always in the same order. For all warps of the block to do.
  __device__ void add_partial_sums(const Place& place, int member, int warps, float (&sums)[kFeatures]) const {
    const int warp = threadIdx.x / 32;
    if (place.is_first_part()) {
#pragma unroll
      for (int v = 0; v < kFeatures; ++v) state_.partial[warp][place.output][v] = sums[v];
    }
    meet_from_anywhere<kThreads>();
    if (member == 0 && place.is_first_part()) {
      for (int other = 1; other < warps; ++other) {
#pragma unroll
        for (int v = 0; v < kFeatures; ++v) sums[v] += state_.partial[warp + other][place.output][v];
      }
    }
    meet_from_anywhere<kThreads>();
  }

  // The answer, in the caller's order: each block writes its share.
  __device__ void store_results() const {
    if (!step_.activations) return;
    const float* results = inputs();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < step_.outputs; j += stride) {
      float values[kFeatures];
      load_features<kFeatures>(results + static_cast<int64_t>(step_.slot_of[j]) * kFeatures, values);
#pragma unroll
      for (int v = 0; v < kFeatures; ++v) {
        if (first_ + v < step_.features) {
          step_.activations[(first_ + v) * step_.outputs + j] = values[v] * step_.scale.unit;
        }
      }
    }
  }

  static constexpr int kAhead = kInShared ? 3 : 1;  // chunks on their way to a lane: as many as registers hold

  const ResidentStep& step_;
  SpreadState& state_;
  float* x_;
  Exchange exchange_;
  int64_t first_ = 0;
};

template <int kFeatures, bool kInShared>
__global__ void __launch_bounds__(kThreads, 1)
    spread_kernel(const __grid_constant__ ResidentStep step, const __grid_constant__ SpreadRoom room,
                  uint32_t* exchange) {
  extern __shared__ __align__(16) char shared[];
  Spread<kFeatures, kInShared> spread(step, room, exchange, shared);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < step.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    spread.run(first);
  }
}

int64_t shared_bytes(int64_t width, int features) {
  return static_cast<int64_t>(sizeof(SpreadState)) + width * features * static_cast<int64_t>(sizeof(float));
}

template <int kFeatures, bool kInShared>
cudaError_t launch(const ResidentStep& step, const SpreadRoom& room, uint32_t* exchange, cudaStream_t stream) {
  const auto kernel = spread_kernel<kFeatures, kInShared>;
  const int64_t shared = shared_bytes(kInShared ? step.max_width : 0, kFeatures);
  int64_t resident_blocks = 0;
  const cudaError_t error = resident_block_count(kernel, kThreads, shared, &resident_blocks);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(room.blocks, resident_blocks / room.lanes)),
                        static_cast<unsigned>(room.lanes));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, step, room, exchange);
}

template <bool kInShared>
cudaError_t launch(const ResidentStep& step, const SpreadRoom& room, uint32_t* exchange, cudaStream_t stream) {
  switch (room.features) {
    case 1:
      return launch<1, kInShared>(step, room, exchange, stream);
    case 2:
      return launch<2, kInShared>(step, room, exchange, stream);
    case 4:
      return launch<4, kInShared>(step, room, exchange, stream);
    default:
      return launch<kMostOfGroup<kInShared>, kInShared>(step, room, exchange, stream);
  }
}

}  // namespace

// Fewer features a group than fit would each have the weights brought again; a group that does not fit reads its inputs
// through L1.
SpreadRoom::SpreadRoom(const PlanView& plan, int64_t all_features, const DeviceLimits& limits) {
  const int64_t width = widest(plan, 0, plan.header->layers);
  const auto fits = [&](int count) { return shared_bytes(width, count) <= limits.block_shared_bytes; };
  in_shared = fits(1);
  const int most = in_shared ? kMostOfGroup<true> : kMostOfGroup<false>;
  features = 1;
  while (features < most && features < all_features) features *= 2;
  while (in_shared && !fits(features)) features /= 2;
  const int64_t groups = (all_features + features - 1) / features;
  lanes = static_cast<int>(std::min({groups, int64_t{kInFlight / features}, int64_t{limits.multiprocessors}}));
  blocks = std::min(limits.multiprocessors / lanes, kMostBlocks);
  buffer_words = round_up(width * features, 4) + kMostBlocks;
}

int64_t SpreadRoom::exchange_words() const { return kBuffers * lanes * buffer_words; }

int64_t most_exchange_words(const PlanView& plan, int64_t features) {
  const int64_t in_flight = std::min(round_up(features, kMostOfGroup<true>), int64_t{kInFlight});
  return kBuffers * in_flight * (widest(plan, 0, plan.header->layers) + 4 + kMostBlocks);
}

cudaError_t launch_spread(const ResidentStep& step, const SpreadRoom& room, uint32_t* exchange, cudaStream_t stream) {
  return room.in_shared ? launch<true>(step, room, exchange, stream) : launch<false>(step, room, exchange, stream);
}

}  // namespace spdnn::cuda
