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
// input of its own with weight 0). A run is cut into *slices* of 32 groups, the last one narrower, so that a GPU warp
// reads the indices of its lanes' groups coalesced, four edges at a time (sliced ELL, section III.B of arXiv
// 2007.14152, with groups in the place of rows). Inside a slice of `width` groups:
//
//   index of edge e of group g             at element ((e / 4) * width + g) * 4 + e % 4
//   value of edge e, output r of group g   at element (((e / 4) * width + g) * 4 + e % 4) * group_outputs + r
//   slot (output position) of output r of group g   = r * width + g
//
// Between layers neurons stand in slot order: the indices of a layer name slots of the layer before, and only after
// the last layer is the original order restored, through the section at `slot_offset`. Where equal neurons were merged,
// several outputs of the original network name one slot there; the last layer may then have fewer outputs than the
// plan.
#pragma once

#include <cstdint>

namespace spdnn {

inline constexpr int64_t kPlanVersion = 2;
inline constexpr int kSliceGroups = 32;      // groups in a slice: the lanes of a warp
inline constexpr int kEdgeChunk = 4;         // edges of one group that lie together
inline constexpr int kMaxGroupOutputs = 32;  // outputs in a group, at most
inline constexpr int64_t kWordAlignment = 4;

#define SPDNN_HEADER_FIELDS(FIELD)                                                     \
  FIELD(int64_t, version)        /* kPlanVersion */                                    \
  FIELD(int64_t, layers)         /* number of PlanLayer records */                     \
  FIELD(int64_t, runs)           /* number of PlanRun records */                       \
  FIELD(int64_t, inputs)         /* width of the first layer's input */                \
  FIELD(int64_t, outputs)        /* output neurons of the original network */          \
  FIELD(int64_t, slot_offset)    /* int32[outputs]: the slot that holds each output */ \
  FIELD(int64_t, words)          /* length of the whole plan in words */               \
  FIELD(int64_t, merged_neurons) /* 1: equal neurons were merged */                    \
  FIELD(int64_t, merge_features) /* 1: equal features may be merged on the way */      \
  FIELD(double, cap)             /* upper clip of every layer; infinity where there is none */

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
  FIELD(int64_t, multiplied_edges) /* edges of the simplified layer, without padding */      \
  FIELD(int64_t, merged)           /* these three as in LayerOrigin */                       \
  FIELD(int64_t, constant)                                                                   \
  FIELD(int64_t, unread)

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

}  // namespace spdnn
