// BLAKE3 of many chunks at once. `cargo xtask ptx` makes blake3.ptx of it.
//
// The tree of BLAKE3 (its specification, sections 2.1 and 2.4): leaves of 1 KiB, each a chain of up to 16
// compressions of 64 bytes; above them a binary tree whose left subtrees are complete. A thread hashes one
// leaf; a block hashes a tile, 256 leaves, and reduces it to one chaining value in shared memory; a second
// kernel joins the tiles of each chunk. Joining neighbours level by level, where what is left over goes up
// unchanged, makes the same tree.
//
// What bounds it is the rate of integer instructions. One G needs 4 xors and 4 rotations, which only the ALU pipe
// has (16 lanes a cycle), and 6 additions, which the multiplier's pipe can do beside it (16 lanes too) as x * 1 + y.
// The compiler would fold a constant 1 into additions of three on the ALU, so the 1 comes as an argument; an addition of
// two it moves to the other pipe by itself.

typedef unsigned int u32;
typedef unsigned long long u64;

#define LEAF_BYTES 1024u
#define BLOCK_BYTES 64u
#define TILE_LEAVES 256u
// On one multiprocessor: 64 registers a thread. With 3 (more registers) and 5 (48) it was 5 % and 3 % slower.
#define TILES_AT_ONCE 4
#define JOINERS 128

#define CHUNK_START 1u
#define CHUNK_END 2u
#define PARENT 4u
#define ROOT 8u

// Where a chunk's bytes are, and where the chaining values of its tiles go.
struct Chunk {
    u64 address;
    u64 len;
    // Of its first tile, in `values`.
    u32 first_tile;
    u32 tiles;
};

// One tile of one chunk.
struct Tile {
    u32 chunk;
    // Within the chunk.
    u32 index;
};

struct Value {
    u32 words[8];
};

__device__ __constant__ const u32 IV[8] = {0x6A09E667u, 0xBB67AE85u, 0x3C6EF372u, 0xA54FF53Au,
                                           0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u};

// x + y, on the multiplier's pipe.
__device__ __forceinline__ u32 sum(u32 x, u32 y, u32 one) { return x * one + y; }

__device__ __forceinline__ u32 rotate(u32 x, u32 by) { return __funnelshift_r(x, x, by); }

__device__ __forceinline__ void g(u32 &a, u32 &b, u32 &c, u32 &d, u32 x, u32 y, u32 one) {
    a = sum(x, a, one) + b;
    d = __byte_perm(d ^ a, 0, 0x1032);
    c = sum(d, c, one);
    b = rotate(b ^ c, 12);
    a = sum(y, a, one) + b;
    d = __byte_perm(d ^ a, 0, 0x0321);
    c = sum(d, c, one);
    b = rotate(b ^ c, 7);
}

#define ROUND(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15) \
    g(v0, v4, v8, v12, m[m0], m[m1], one); \
    g(v1, v5, v9, v13, m[m2], m[m3], one); \
    g(v2, v6, v10, v14, m[m4], m[m5], one); \
    g(v3, v7, v11, v15, m[m6], m[m7], one); \
    g(v0, v5, v10, v15, m[m8], m[m9], one); \
    g(v1, v6, v11, v12, m[m10], m[m11], one); \
    g(v2, v7, v8, v13, m[m12], m[m13], one); \
    g(v3, v4, v9, v14, m[m14], m[m15], one);

// Replaces the chaining value by that of the block `m` after it.
__device__ __forceinline__ void compress(u32 cv[8], const u32 m[16], u32 counter, u32 len, u32 flags, u32 one) {
    u32 v0 = cv[0], v1 = cv[1], v2 = cv[2], v3 = cv[3], v4 = cv[4], v5 = cv[5], v6 = cv[6], v7 = cv[7];
    // The counter's upper half is zero: a chunk has fewer than 2^32 leaves.
    u32 v8 = IV[0], v9 = IV[1], v10 = IV[2], v11 = IV[3], v12 = counter, v13 = 0, v14 = len, v15 = flags;
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)
    cv[0] = v0 ^ v8;
    cv[1] = v1 ^ v9;
    cv[2] = v2 ^ v10;
    cv[3] = v3 ^ v11;
    cv[4] = v4 ^ v12;
    cv[5] = v5 ^ v13;
    cv[6] = v6 ^ v14;
    cv[7] = v7 ^ v15;
}

// A whole block at an address divisible by 16.
__device__ __forceinline__ void load_aligned(u32 m[16], u64 at) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[4 * i]), "=r"(m[4 * i + 1]), "=r"(m[4 * i + 2]), "=r"(m[4 * i + 3])
                     : "l"(at + 16 * i));
    }
}

// The first `len` bytes of a block at any address, and zeros after them. Only words that hold one of these bytes
// are read.
__device__ void load_any(u32 m[16], u64 at, u32 len) {
    const u32 *words = (const u32 *)(at & ~3ull);
    u32 skip = (u32)(at & 3), end = skip + len;
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        u32 low = 4 * i < end && 4 * i < len ? words[i] : 0;
        u32 high = skip != 0 && 4 * i + 4 < end ? words[i + 1] : 0;
        u32 word = __funnelshift_r(low, high, 8 * skip);
        u32 left = len > 4 * i ? len - 4 * i : 0;
        m[i] = left >= 4 ? word : word & ((1u << (8 * left)) - 1);
    }
}

__device__ __forceinline__ void start(u32 cv[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) cv[i] = IV[i];
}

// The chaining value of two neighbours.
__device__ __forceinline__ void join(u32 cv[8], const u32 m[16], bool root, u32 one) {
    start(cv);
    compress(cv, m, 0, BLOCK_BYTES, PARENT | (root ? ROOT : 0), one);
}

// One block of TILE_LEAVES threads for each tile: leaves, and the tree above them. Writes each tile's chaining value
// to `values`, and the digests of chunks of one tile to `digests`. `one` is 1.
extern "C" __global__ void __launch_bounds__(TILE_LEAVES, TILES_AT_ONCE)
    hash_tiles(const Chunk *chunks, const Tile *tiles, Value *values, Value *digests, u32 one) {
    // By word, then by leaf, so that neighbouring threads use neighbouring banks.
    __shared__ u32 shared[8][TILE_LEAVES];
    Tile tile = tiles[blockIdx.x];
    Chunk chunk = chunks[tile.chunk];
    u64 begin = (u64)tile.index * (TILE_LEAVES * LEAF_BYTES);
    u64 left = chunk.len - begin;
    u32 bytes = left < TILE_LEAVES * LEAF_BYTES ? (u32)left : TILE_LEAVES * LEAF_BYTES;
    // An empty chunk has one empty leaf.
    u32 leaves = bytes == 0 ? 1 : (bytes + LEAF_BYTES - 1) / LEAF_BYTES;
    bool alone = chunk.tiles == 1;
    u32 t = threadIdx.x;

    if (t < leaves) {
        u64 at = chunk.address + begin + t * LEAF_BYTES;
        u32 len = bytes - t * LEAF_BYTES;
        if (len > LEAF_BYTES) len = LEAF_BYTES;
        u32 counter = tile.index * TILE_LEAVES + t;
        u32 blocks = len == 0 ? 1 : (len + BLOCK_BYTES - 1) / BLOCK_BYTES;
        bool aligned = (at & 15) == 0;
        u32 cv[8];
        start(cv);
#pragma unroll 1
        for (u32 i = 0; i < blocks; i++) {
            u32 m[16];
            u32 n = len - i * BLOCK_BYTES;
            if (n > BLOCK_BYTES) n = BLOCK_BYTES;
            if (aligned && n == BLOCK_BYTES) {
                load_aligned(m, at + i * BLOCK_BYTES);
            } else {
                load_any(m, at + i * BLOCK_BYTES, n);
            }
            u32 flags = 0;
            if (i == 0) flags |= CHUNK_START;
            if (i + 1 == blocks) flags |= CHUNK_END | (alone && leaves == 1 ? ROOT : 0);
            compress(cv, m, counter, n, flags, one);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) shared[i][t] = cv[i];
    }
    __syncthreads();

    u32 count = leaves;
#pragma unroll 1
    while (count > 1) {
        u32 pairs = count / 2;
        u32 cv[8];
        // The last of an odd number goes up as it is.
        bool odd = t == pairs && (count & 1) != 0;
        if (t < pairs) {
            u32 m[16];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                m[i] = shared[i][2 * t];
                m[8 + i] = shared[i][2 * t + 1];
            }
            join(cv, m, alone && count == 2, one);
        } else if (odd) {
#pragma unroll
            for (int i = 0; i < 8; i++) cv[i] = shared[i][2 * t];
        }
        __syncthreads();
        if (t < pairs || odd) {
#pragma unroll
            for (int i = 0; i < 8; i++) shared[i][t] = cv[i];
        }
        __syncthreads();
        count = pairs + (count & 1);
    }
    if (t < 8) {
        u32 word = shared[t][0];
        if (alone) {
            digests[tile.chunk].words[t] = word;
        } else {
            values[chunk.first_tile + tile.index].words[t] = word;
        }
    }
}

// One block for each chunk of more than one tile: the tree above its tiles, in place.
extern "C" __global__ void __launch_bounds__(JOINERS)
    join_tiles(const Chunk *chunks, Value *values, Value *digests, u32 one) {
    Chunk chunk = chunks[blockIdx.x];
    if (chunk.tiles < 2) return;
    Value *tree = values + chunk.first_tile;
    u32 count = chunk.tiles;
#pragma unroll 1
    while (count > 1) {
        u32 pairs = count / 2;
        // All pairs of one round are read before one of them is written, and a round writes below what the next reads.
#pragma unroll 1
        for (u32 first = 0; first < pairs; first += blockDim.x) {
            u32 at = first + threadIdx.x;
            u32 cv[8];
            if (at < pairs) {
                u32 m[16];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    m[i] = tree[2 * at].words[i];
                    m[8 + i] = tree[2 * at + 1].words[i];
                }
                join(cv, m, count == 2, one);
            }
            __syncthreads();
            if (at < pairs) {
#pragma unroll
                for (int i = 0; i < 8; i++) tree[at].words[i] = cv[i];
            }
            __syncthreads();
        }
        if ((count & 1) != 0 && threadIdx.x < 8) {
            tree[pairs].words[threadIdx.x] = tree[count - 1].words[threadIdx.x];
        }
        __syncthreads();
        count = pairs + (count & 1);
    }
    if (threadIdx.x < 8) digests[blockIdx.x].words[threadIdx.x] = tree[0].words[threadIdx.x];
}
