// The layout of a plan: the one definition that the CPU back end, the CUDA back end and Python read.
//
// A plan is one array of 32-bit words:
//
//   PlanHeader | PlanLayer[layers] | PlanRun[runs] | sections
//
// Offsets are counted in words from the start of the array and are multiples of 4 (16 bytes).
//
// A layer holds its output neurons as *row groups*: outputs with the same set of inputs. All groups of one *run* have
// the same number of outputs (a power of two) and the same number of edges (a multiple of 4; a shorter row repeats an
// input of its own with weight 0); edges of a group stand in any order. A run is cut into *slices* of 32 groups, the
// last one narrower, so that a GPU warp reads the indices of its lanes' groups coalesced, four edges at a time (sliced
// ELL, section III.B of arXiv 2007.14152, with groups in the place of rows). Inside a slice of `width` groups:
//
//   index of edge e of group g             at element ((e / 4) * width + g) * 4 + e % 4
//   value of edge e, output r of group g   at element (((e / 4) * width + g) * 4 + e % 4) * group_outputs + r
//   slot (output position) of output r of group g   = r * width + g
//
// A layer of outputs that share no inputs may have *staged* sections, too, for the CUDA kernels of that family: the
// same edges once more, as section III of arXiv 2007.14152 lays them out. A *block* is kStagedRows outputs that lie
// side by side. Its footprint, the inputs that it reads, is cut into *stages* that fit into shared memory. The staged
// sections begin with the number of each block's first stage, uint32[blocks + 1]; then come the StagedStage records,
// and what they point to.
//
// Between layers neurons stand in slot order: the indices of a layer name slots of the layer before, and only after
// the last layer is the original order restored, through the section at `slot_offset`. Where equal neurons were merged,
// several outputs of the original network name one slot there; the last layer may then have fewer outputs than the
// plan.
#pragma once

#include <cstdint>
#include <limits>

namespace spdnn {

inline constexpr int64_t kPlanVersion = 4;
inline constexpr int kSliceGroups = 32;      // groups in a slice: the lanes of a warp
inline constexpr int kEdgeChunk = 4;         // edges of one group that lie together
inline constexpr int kMaxGroupOutputs = 32;  // outputs in a group, at most
inline constexpr int64_t kWordAlignment = 4;

inline constexpr int kStagedRows = 512;    // outputs of a block
inline constexpr int kStagedInputs = 768;  // inputs of a stage, at most: 96 KiB of shared memory for 32 features

// What sums are clipped to where a bound is infinite: an overflow stays a number, and an edge of weight 0 that pads a
// row makes no NaN of it. A sum that is NaN becomes the lower bound.
constexpr float finite_bound(float bound) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  return bound < -kLargest ? -kLargest : bound > kLargest ? kLargest : bound;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

#define SPDNN_HEADER_FIELDS(FIELD)                                                     \
  FIELD(int64_t, version)        /* kPlanVersion */                                    \
  FIELD(int64_t, layers)         /* number of PlanLayer records */                     \
  FIELD(int64_t, runs)           /* number of PlanRun records */                       \
  FIELD(int64_t, inputs)         /* width of the first layer's input */                \
  FIELD(int64_t, outputs)        /* output neurons of the original network */          \
  FIELD(int64_t, slot_offset)    /* int32[outputs]: the slot that holds each output */ \
  FIELD(int64_t, words)          /* length of the whole plan in words */               \
  FIELD(int64_t, merged_neurons) /* 1: equal neurons were merged */                    \
  FIELD(int64_t, merge_features) /* 1: equal features may be merged on the way */

#define SPDNN_LAYER_FIELDS(FIELD)                                                            \
  FIELD(int64_t, inputs)                                                                     \
  FIELD(int64_t, outputs)                                                                    \
  FIELD(int64_t, edges) /* stored edges of the original layer */                             \
  FIELD(int64_t, first_run)                                                                  \
  FIELD(int64_t, runs)                                                                       \
  FIELD(int64_t, first_word)  /* where the layer's sections begin */                         \
  FIELD(int64_t, words)       /* length of its sections, which lie side by side */           \
  FIELD(int64_t, next_words)  /* the next layer's `words`: a kernel fetches it in advance */ \
  FIELD(int64_t, index_bits)  /* 16 where inputs <= 65536, else 32 */                        \
  FIELD(int64_t, prunable)    /* 1: a feature all zero after this layer stays so */          \
  FIELD(int64_t, bias_offset) /* float[outputs] in slot order; -1: one `bias` for all */     \
  FIELD(double, bias)                                                                        \
  FIELD(float, lower) /* what the layer's sums are clipped to; infinite where not at all */  \
  FIELD(float, upper)                                                                        \
  FIELD(int64_t, multiplied_edges) /* edges of the simplified layer, without padding */      \
  FIELD(int64_t, merged)           /* these three as in LayerOrigin */                       \
  FIELD(int64_t, constant)                                                                   \
  FIELD(int64_t, unread)                                                                     \
  FIELD(int64_t, staged_offset) /* where the staged sections begin; -1: there are none */    \
  FIELD(int64_t, stage_offset)  /* StagedStage[stages] */                                    \
  FIELD(int64_t, stages)                                                                     \
  FIELD(int64_t, staged_single_valued) /* 1: `staged_value` for all edges */                 \
  FIELD(double, staged_value)

#define SPDNN_RUN_FIELDS(FIELD)                                                      \
  FIELD(int64_t, group_outputs) /* outputs of each group: 1, 2, 4, 8, 16 or 32 */    \
  FIELD(int64_t, edges)         /* edges of each group, padded to a multiple of 4 */ \
  FIELD(int64_t, groups)                                                             \
  FIELD(int64_t, first_slot)                                                         \
  FIELD(int64_t, index_offset) /* uint16 or uint32, by the layer's index_bits */     \
  FIELD(int64_t, value_offset) /* float; -1: one `value` for all, nothing padded */  \
  FIELD(double, value)

#define SPDNN_DECLARE_FIELD(type, name) type name;

struct PlanHeader {
  SPDNN_HEADER_FIELDS(SPDNN_DECLARE_FIELD)
};

struct PlanLayer {
  SPDNN_LAYER_FIELDS(SPDNN_DECLARE_FIELD)
};

struct PlanRun {
  SPDNN_RUN_FIELDS(SPDNN_DECLARE_FIELD)
};

#undef SPDNN_DECLARE_FIELD

static_assert(sizeof(PlanLayer) % sizeof(int64_t) == 0, "records are passed on as 64-bit words");

// One stage of a block. Offsets are counted in words from the layer's `staged_offset`. A chunk is kEdgeChunk edges of
// one row.
struct StagedStage {
  uint32_t map_offset;    // uint32[map_count]: slots of the inputs, ascending
  uint32_t map_count;     // kStagedInputs at most
  uint32_t chunk_offset;  // uint32[kStagedRows + 1]: number of each row's first chunk; the last entry is their count
  uint32_t index_offset;  // uint16[chunks][kEdgeChunk]: position in the map; kStagedInputs where there is no edge
  uint32_t value_offset;  // float[chunks][kEdgeChunk], 0 where there is no edge; 0: the layer is single-valued
  uint32_t unused[3];
};

// --- for derivatives ---
//
// A plan may be accompanied by its *rows*: the same layers in compressed rows, by output neuron and by input neuron,
// one array of 32-bit words and one record a layer. Neurons between layers stand in the plan's slot order; the rows of
// the last layer are the outputs of the original network, in their order. Padding is left out.
//
// What a derivative keeps of the way forward is a *mask*: of each feature and layer whose activation clips, one bit an
// output, set where the sum lay inside the bounds. Bit b of word w is output 32 w + b.

#define SPDNN_ROWS_FIELDS(FIELD)                                                                 \
  FIELD(int64_t, inputs)                                                                         \
  FIELD(int64_t, outputs)                                                                        \
  FIELD(int64_t, edges)                                                                          \
  FIELD(int64_t, row_offset)    /* int32[outputs + 1]: where each output's edges begin */        \
  FIELD(int64_t, index_offset)  /* int32[edges]: input of each */                                \
  FIELD(int64_t, value_offset)  /* float[edges] */                                               \
  FIELD(int64_t, bias_offset)   /* float[outputs] */                                             \
  FIELD(int64_t, column_offset) /* int32[inputs + 1]: where each input's edges begin */          \
  FIELD(int64_t, output_offset) /* int32[edges]: output of each, ascending inside an input */    \
  FIELD(int64_t, weight_offset) /* float[edges]: the values once more, in that order */          \
  FIELD(int64_t, mask_word)     /* where the layer's words of a feature's mask begin */          \
  FIELD(int64_t, mask_words)    /* how many they are; none where the activation clips nothing */ \
  FIELD(double, lower)          /* what sums are clipped to */                                   \
  FIELD(double, upper)

#define SPDNN_DECLARE_FIELD(type, name) type name;

struct RowsLayer {
  SPDNN_ROWS_FIELDS(SPDNN_DECLARE_FIELD)
};

#undef SPDNN_DECLARE_FIELD

inline constexpr int kMaskBits = 32;  // of a word

}  // namespace spdnn
