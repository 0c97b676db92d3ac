// Softmax statistics of logits and their gradient, over a tile of columns at a time.
//
// y = cap(logit + shift + bias) / temperature, banned entries -inf; p = softmax of y over all tiles.
// A tile is cut into blocks of kLossBlock columns. `absorb_logits` adds a tile to the statistics of
// its rows and replaces each y by exp(y - reference), the reference being the block's largest y;
// `logit_gradient` turns those exponentials into the gradient of the logits, in place.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace eapo::cpu {

constexpr int64_t kLossBlock = 4096;

inline int64_t loss_blocks(int64_t width) { return (width + kLossBlock - 1) / kLossBlock; }

// Statistics of the columns of a row seen so far. A row with a NaN or an infinite logit ends up
// with NaN in `mass`.
struct LossRow {
  double max;      // largest y, -inf before the first column
  double mass;     // sum of exp(y - max)
  double moment;   // sum of exp(y - max) (y - max)
  double target;   // y of the target, -inf where it is banned
  double mass2;    // sum of exp(y - max)^2
  double mass3;    // sum of exp(y - max)^3
};

// What makes y of a logit.
struct LogitMap {
  const float* bias;          // [width] of the tile's columns, -inf bans; null: 0
  const float* shift;         // [rows]; null: 0
  const float* own;           // [rows] logit + shift of the target; null: the tile has it
  float temperature;          // above 0
  float softcap;              // cap(x) = softcap * tanh(x / softcap); 0: off
  const int32_t* ban_starts;  // [rows + 1] range of each row in ban_ids; null: no bans
  const int32_t* ban_ids;     // vocabulary ids
};

struct AbsorbArgs {
  Storage storage;         // of logits and out
  const void* logits;      // [rows, width] contiguous
  int64_t rows, width;
  int64_t column;          // vocabulary id of the first column
  LogitMap map;
  const int64_t* targets;  // [rows] vocabulary ids
  LossRow* state;          // [rows]; null: leave the statistics alone
  bool powers;             // whether mass2 and mass3 are wanted
  void* out;               // [rows, width] exponentials, may be `logits`; null: not wanted
  float* references;       // [rows, loss_blocks(width)]; null: not wanted
};

// Row `source[k]` of the tile becomes row `target[k]` of the gradient
//   a (onehot - p) + b (-p (ln p + H)), times dy / dlogit.
// A row may be written where another is read only if both are the same.
struct LogitGradientArgs {
  Storage storage;          // of tile
  void* tile;               // [rows, width] contiguous
  int64_t rows, width;
  int64_t column;
  const float* references;  // [rows, loss_blocks(width)]
  const LossRow* state;     // [rows], of all columns
  const int64_t* targets;   // [rows]
  int64_t count;            // rows of the gradient
  const int64_t* source;    // [count]
  const int64_t* target;    // [count]
  const float* a;           // [count]
  const float* b;           // [count]; null: 0
  float temperature, softcap;
};

void absorb_logits(const AbsorbArgs& args);
void logit_gradient(const LogitGradientArgs& args);

// The same for some rows (of the gradient), on the calling thread.
void absorb_rows(const AbsorbArgs& args, int64_t first, int64_t last);
void gradient_rows(const LogitGradientArgs& args, int64_t first, int64_t last);

// Sets every entry of row i of a bfloat16 [rows, width] to values[i], rounded.
void fill_rows(uint16_t* out, const float* values, int64_t rows, int64_t width);

// A float32 sum kept as two planes: `high` holds the upper 16 bits of each number, `low` the lower.
// Adds bfloat16 numbers to it; the result is the float32 sum, bit for bit.
void add_to_planes(uint16_t* high, uint16_t* low, const uint16_t* addend, int64_t count);

// to [rows, width] = from [width, rows] transposed, or the sum of both; contiguous.
void take_transposed(float* to, const float* from, int64_t rows, int64_t width, bool add);

// Rounds the sum to bfloat16, in `high`.
void round_planes(uint16_t* high, const uint16_t* low, int64_t count);

}  // namespace eapo::cpu
