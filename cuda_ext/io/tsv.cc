#include "io/tsv.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <functional>
#include <future>
#include <numeric>
#include <system_error>
#include <vector>

namespace spdnn {
namespace {

constexpr int64_t kPartBytes = 1 << 20;  // smaller parts are not worth a thread

// A stretch of whole lines. Its last byte is a newline, which ends every field, so that none is read beyond `end`.
struct Part {
  const char* begin;
  const char* end;
  int64_t lines;
  int64_t first_row;
  int64_t rows;         // lines read: fewer than `lines` where one is malformed
  const char* read_to;  // the end, or where the malformed line begins
};

struct Columns {
  int32_t* first;
  int32_t* second;
  float* third;
};

// As std::count, in a form that compilers turn into vector code.
int64_t count_lines(const char* begin, const char* end) {
  constexpr int64_t kLanes = 64, kSteps = 255;  // as many steps as a lane can count
  int64_t lines = 0;
  for (; end - begin >= kSteps * kLanes; begin += kSteps * kLanes) {
    uint8_t counts[kLanes] = {};
    for (int64_t step = 0; step < kSteps; ++step) {
      for (int64_t lane = 0; lane < kLanes; ++lane) counts[lane] += begin[step * kLanes + lane] == '\n';
    }
    lines += std::accumulate(counts, counts + kLanes, int64_t{0});
  }
  return lines + std::count(begin, end, '\n');
}

constexpr int64_t kWord = sizeof(uint64_t);

uint64_t load_word(const char* text) {
  uint64_t word;
  std::memcpy(&word, text, kWord);
  return word;
}

// As std::memcmp(a, b, size) == 0, but without a call: the sizes here are small.
bool equal_bytes(const char* a, const char* b, int64_t size) {
  if (size < kWord) return std::equal(a, a + size, b);
  for (int64_t at = 0; at < size - kWord; at += kWord) {
    if (load_word(a + at) != load_word(b + at)) return false;
  }
  return load_word(a + size - kWord) == load_word(b + size - kWord);  // overlaps the word before
}

// Bytes that were read a moment ago. Where they stand in the text again, what was read from them holds again: most
// files repeat the ends of their lines.
class Repeat {
 public:
  bool at(const char* text, const char* end) const {
    return size_ > 0 && end - text >= size_ && equal_bytes(text, bytes_, size_);
  }
  void remember(const char* begin, const char* end) {
    bytes_ = begin;
    size_ = end - begin;
  }
  int64_t size() const { return size_; }

 private:
  const char* bytes_ = nullptr;
  int64_t size_ = 0;
};

const char* skip_blanks(const char* text) {
  while (*text == ' ') ++text;
  return text;
}

// The readers return where the field ends, its blanks included, or null where it is malformed.
const char* read_any_index(const char* text, const char* end, int32_t* index) {
  const auto [rest, error] = std::from_chars(skip_blanks(text), end, *index);
  return error == std::errc() ? skip_blanks(rest) : nullptr;
}

const char* read_index(const char* text, const char* end, int32_t* index) {
  const char* digit = text;
  uint32_t value = 0;
  for (uint32_t next; (next = static_cast<uint32_t>(*digit - '0')) < 10; ++digit) value = value * 10 + next;
  if (digit == text || digit - text > 9 || *digit != '\t') return read_any_index(text, end, index);
  *index = static_cast<int32_t>(value);
  return digit;
}

const char* read_number(const char* text, const char* end, float* number) {
  text = skip_blanks(text);
  if (*text == '+' && text[1] != '-') ++text;
  auto [rest, error] = std::from_chars(text, end, *number);
  if (error == std::errc::result_out_of_range) {  // zero or infinite as a float
    double wide = 0;
    error = std::from_chars(text, end, wide).ec;
    *number = static_cast<float>(wide);
  }
  return error == std::errc() ? skip_blanks(rest) : nullptr;
}

// A delimiter with nothing behind it is no field.
const char* read_line_end(const char* text) {
  if (*text == '\t') text = skip_blanks(text + 1);
  if (*text == '\r') ++text;
  return *text == '\n' ? text + 1 : nullptr;
}

void read_part(Part& part, Columns columns) {
  Repeat after_first, after_second;
  int32_t second = 0;
  float third = 0;
  int64_t rows = 0;
  const char* line = part.begin;
  const char* const end = part.end;
  for (; line != end; ++rows) {
    const char* text = read_index(line, end, columns.first + rows);
    if (!text) break;
    if (after_first.at(text, end)) {
      text += after_first.size();
    } else {
      const char* const tail = text;
      if (*text != '\t' || !(text = read_index(text + 1, end, &second)) || *text != '\t') break;
      ++text;
      if (after_second.at(text, end)) {
        text += after_second.size();
      } else {
        const char* const number = text;
        if (!(text = read_number(text, end, &third)) || !(text = read_line_end(text))) break;
        after_second.remember(number, text);
      }
      after_first.remember(tail, text);
    }
    columns.second[rows] = second;
    columns.third[rows] = third;
    line = text;
  }
  part.rows = rows;
  part.read_to = line;
}

// Cuts the whole lines of the text into parts of about one size.
std::vector<Part> split(const char* text, int64_t size, int threads) {
  const char* end = text + size;
  while (end != text && end[-1] != '\n') --end;
  const int64_t count = std::clamp<int64_t>((end - text) / kPartBytes, 1, std::max(threads, 1));
  std::vector<Part> parts;
  const char* begin = text;
  for (int64_t k = 1; k <= count; ++k) {
    const char* next = std::max(begin, text + (end - text) / count * k);
    next = k == count || next == end ? end : std::find(next, end, '\n') + 1;
    parts.push_back({begin, next, 0, 0, 0, begin});
    begin = next;
  }
  return parts;
}

// Calls work(part) for all parts at once, for the first on this thread.
template <typename Work>
void for_each_part(std::vector<Part>& parts, Work work) {
  std::vector<std::future<void>> others;
  for (size_t k = 1; k < parts.size(); ++k) others.push_back(std::async(work, std::ref(parts[k])));
  work(parts[0]);
  for (std::future<void>& other : others) other.get();
}

}  // namespace

TsvTable parse_tsv(const char* text, int64_t size, int threads) {
  std::vector<Part> parts = split(text, size, threads);
  for_each_part(parts, [](Part& part) { part.lines = count_lines(part.begin, part.end); });
  int64_t lines = 0;
  for (Part& part : parts) {
    part.first_row = lines;
    lines += part.lines;
  }
  TsvTable table;
  table.first.reset(new int32_t[lines]);
  table.second.reset(new int32_t[lines]);
  table.third.reset(new float[lines]);
  for_each_part(parts, [&table](Part& part) {
    read_part(part, {table.first.get() + part.first_row, table.second.get() + part.first_row,
                     table.third.get() + part.first_row});
  });
  for (const Part& part : parts) {
    table.rows += part.rows;
    table.bytes = part.read_to - text;
    if (part.rows != part.lines) break;
  }
  return table;
}

}  // namespace spdnn
