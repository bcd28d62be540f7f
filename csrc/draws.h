// The choices of the augmentation: functions of (seed, epoch, sample) alone, the same for the CUDA
// and the CPU half, whatever the batch size and the place in the batch.
//
// Philox4x32-10 turns a counter and a key into four random words (Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key: the seed. Counter: sample, epoch,
// and what the words are for, so that switching one augmentation on leaves the others' choices as
// they were. constexpr: nvcc compiles such functions for the device as well.
#pragma once

#include "arguments.h"

namespace fastcnn {

struct Words {
  uint32_t a, b, c, d;
};

constexpr Words philox(uint64_t key, Words counter) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xd2511f53} * counter.a;
    const uint64_t q = uint64_t{0xcd9e8d57} * counter.c;
    counter = {static_cast<uint32_t>(q >> 32) ^ counter.b ^ low, static_cast<uint32_t>(q),
               static_cast<uint32_t>(p >> 32) ^ counter.d ^ high, static_cast<uint32_t>(p)};
    low += 0x9e3779b9;
    high += 0xbb67ae85;
  }
  return counter;
}

// what a sample's words are for
enum class Purpose : uint32_t { crop_and_flip, cutout, alternating_flip };

constexpr Words words(int64_t seed, int64_t sample, int64_t epoch, Purpose purpose) {
  const uint64_t number = static_cast<uint64_t>(sample);
  return philox(static_cast<uint64_t>(seed),
                {static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32),
                 static_cast<uint32_t>(epoch), static_cast<uint32_t>(purpose)});
}

// uniform in 0..count-1, up to count / 2^32
constexpr int below(uint32_t word, int count) {
  return static_cast<int>(static_cast<uint64_t>(word) * static_cast<uint32_t>(count) >> 32);
}

// the window's offset from the image, whether it is mirrored, the cutout's upper left corner
struct Choice {
  int dy = 0, dx = 0;
  bool mirrored = false;
  int top = 0, left = 0;
};

constexpr Choice choose(const Augment& args, int64_t sample, int64_t epoch) {
  Choice choice;
  if (args.padding > 0 || args.flip == Flip::random) {
    const Words drawn = words(args.seed, sample, epoch, Purpose::crop_and_flip);
    choice.dy = below(drawn.a, 2 * args.padding + 1) - args.padding;
    choice.dx = below(drawn.b, 2 * args.padding + 1) - args.padding;
    choice.mirrored = args.flip == Flip::random && drawn.c >> 31;
  }
  if (args.flip == Flip::alternating) {
    // one half of the samples in even epochs, the other in odd ones
    const bool even = words(args.seed, sample, 0, Purpose::alternating_flip).a >> 31;
    choice.mirrored = even != (epoch % 2 != 0);
  }
  if (args.cutout > 0) {
    const Words drawn = words(args.seed, sample, epoch, Purpose::cutout);
    choice.top = below(drawn.a, args.h) - args.cutout / 2;
    choice.left = below(drawn.b, args.w) - args.cutout / 2;
  }
  return choice;
}

// where a position of the padded image comes from; -1: from nowhere, it is a zero pixel
constexpr int source_of(int position, int length, bool reflect) {
  if (position >= 0 && position < length) return position;
  if (!reflect) return -1;
  return position < 0 ? -position : 2 * (length - 1) - position;
}

constexpr int64_t sample_of(const Augment& args, int64_t i) {
  int64_t place = args.at[1] + i;
  if (place >= args.length) place %= args.length;
  return args.order[place];
}

// where image and label i of the batch lie, which is of `sample`
constexpr int64_t place_of(const Augment& args, int64_t i, int64_t sample) {
  return args.gathered ? i : sample;
}

}  // namespace fastcnn
