// Many copies at once. `cargo xtask ptx` makes copy.ptx of it.
//
// The driver takes microseconds for each copy on a device, whatever its length. An update of some thousand chunks
// that lie anywhere is one launch here.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256u
// Blocks for each copy, a slice each: neighbours in the grid are neighbours in memory.
#define SLICES 16u
#define PUT_WORDS 240u

struct Copy {
    u64 from;
    u64 to;
    u64 len;
};

extern "C" __global__ void __launch_bounds__(THREADS) copy_spans(const Copy *copies) {
    Copy copy = copies[blockIdx.x / SLICES];
    u64 slice = (copy.len / SLICES + 16) & ~15ull;
    u64 begin = slice * (blockIdx.x % SLICES);
    if (begin >= copy.len) return;
    u64 len = copy.len - begin < slice ? copy.len - begin : slice;
    u64 from = copy.from + begin, to = copy.to + begin;
    // Bytes before both sides are aligned; all of them where they never are at once.
    u64 head = (from & 15) == (to & 15) ? (16 - (from & 15)) & 15 : len;
    if (head > len) head = len;
    for (u64 at = threadIdx.x; at < head; at += THREADS) ((u8 *)to)[at] = ((const u8 *)from)[at];
    u64 words = (len - head) / 16;
    const uint4 *source = (const uint4 *)(from + head);
    uint4 *target = (uint4 *)(to + head);
    u64 at = threadIdx.x;
    // Four loads are under way before the first is waited for. With eight, and past the caches, it was 7 % slower.
    for (; at + 3 * THREADS < words; at += 4 * THREADS) {
        uint4 held[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) held[i] = source[at + i * THREADS];
#pragma unroll
        for (u32 i = 0; i < 4; i++) target[at + i * THREADS] = held[i];
    }
    for (; at < words; at += THREADS) target[at] = source[at];
    for (u64 tail = head + words * 16 + threadIdx.x; tail < len; tail += THREADS) {
        ((u8 *)to)[tail] = ((const u8 *)from)[tail];
    }
}

struct Words {
    uint4 words[PUT_WORDS];
};

// Writes what it is launched with: arguments of other kernels, past the copy engine, which copies chunks meanwhile and
// takes tens of microseconds to change over to another stream's copy and back.
extern "C" __global__ void __launch_bounds__(THREADS) put(uint4 *to, u32 count, const __grid_constant__ Words from) {
    if (threadIdx.x < count) to[threadIdx.x] = from.words[threadIdx.x];
}
