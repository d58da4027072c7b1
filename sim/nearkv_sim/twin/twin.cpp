// SPDX-License-Identifier: Apache-2.0
// The card `twin`: the whole accelerator on the processor, bit for bit, as fast as a SmartSSD's flash.
//
// A run is cut into units, each some tiles of one job. Threads take unit after unit; whoever finishes the
// last one of a job writes its partial. All sums are exact and associative (number.Wide), so neither the
// cut nor the order changes a bit. `twin.py` is the only caller, through the C functions at the end.

#include "twin.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace twin {

uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? b >> 1 ^ CRC_POLYNOMIAL : b >> 1;
    }
    return product;
}

uint32_t crc_power(uint64_t n) {
    uint32_t power = 1u << 31, square = 1u << 30;  // x^0, x^1
    for (; n; n >>= 1, square = crc_multiply(square, square))
        if (n & 1) power = crc_multiply(power, square);
    return power;
}

namespace {

using Clock = std::chrono::steady_clock;

// Tiles of a unit, at most: a few milliseconds.
constexpr int UNIT_TILES = 64;

struct Page {
    uint64_t address;
    int tokens;
    uint32_t flags, crc_k, crc_v;
};

struct TileRef {
    uint32_t page;
    uint16_t first, tokens;
};

// What a tile contributes to its page's status.
struct TileCheck {
    uint32_t crc_k, crc_v;
    bool non_finite;
};

struct Job {
    abi::Job fields;
    std::vector<Page> pages;
    std::vector<TileRef> tiles;
    std::vector<TileCheck> checks;
    int rows = 0;
    std::mutex lock;
    int units_left = 0;
    std::unique_ptr<Sums> sums;  // of finished units, while others are under way
};

struct Unit {
    int job, first_tile, n_tiles;
};

struct Counters {
    uint64_t kv_beats, kv_bursts, partial_beats;
    uint32_t n_failed;
};

int part_bytes(const abi::Job& job) { return job.page_tokens * job.head_dim * KV_ELEMENT_BYTES; }

int rows_of(const abi::Job& job) { return (job.group_size + ROW_STEP - 1) / ROW_STEP * ROW_STEP; }

uint64_t elements_bytes(const abi::Job& job) {
    uint64_t bytes = uint64_t(job.head_dim + 2) * rows_of(job) * WIDE_BYTES;
    return (bytes + BEAT_BYTES - 1) / BEAT_BYTES * BEAT_BYTES;
}

int tile_tokens(const abi::Job& job) { return std::min<int>(job.page_tokens, TILE_TOKENS); }

// The low bits as a signed number: what the hardware takes of a field that has more.
int32_t low_bits(int32_t value, int bits) {
    return static_cast<int32_t>(uint32_t(value) << (32 - bits)) >> (32 - bits);
}

// An empty sum; or one of zeros that count 2^exponent.
void reset(BlockSum& sum, const int* exponent) {
    sum.top = NO_TOP;
    if (!exponent) return;
    std::fill_n(sum.even, LANES, 0), std::fill_n(sum.odd, LANES, 0);
    sum.top = (*exponent + WINDOW_TOP) >> LIMB_STEP_LOG2;
}

void reset(Sums& sums, const abi::Job& job) {
    constexpr int of_nothing = RUN_MAX_EMPTY, of_no_product = RUN_MAX_EMPTY + EXPONENT_FLOOR;
    for (int i = 0; i < rows_of(job); i++) {
        const bool pads = i >= job.group_size;  // attends to nothing in every tile
        sums.run_max[i] = RUN_MAX_EMPTY;
        reset(sums.denominators[i], pads ? &of_nothing : nullptr);
        for (int part = 0; part < job.head_dim / LANES; part++)
            reset(sums.out[i][part], pads ? &of_no_product : nullptr);
    }
    sums.saturated = false;
}

void limbs_of(const BlockSum& sum, int lane, int32_t limbs[N_LIMBS]) {
    limbs[0] = static_cast<int32_t>(sum.even[lane]), limbs[2] = static_cast<int32_t>(sum.even[lane] >> 32);
    limbs[1] = static_cast<int32_t>(sum.odd[lane]), limbs[3] = static_cast<int32_t>(sum.odd[lane] >> 32);
}

void merge(BlockSum& into, const BlockSum& other, int lanes) {
    const int top = std::max(into.top, other.top);
    for (int lane = 0; lane < lanes; lane++) {
        int32_t a[N_LIMBS], b[N_LIMBS], sum[N_LIMBS];
        limbs_of(into, lane, a), limbs_of(other, lane, b);
        for (int j = 0; j < N_LIMBS; j++) {
            int from_a = j + top - into.top, from_b = j + top - other.top;
            sum[j] = (from_a < N_LIMBS ? a[from_a] : 0) + (from_b < N_LIMBS ? b[from_b] : 0);
        }
        into.even[lane] = uint32_t(sum[0]) | uint64_t(uint32_t(sum[2])) << 32;
        into.odd[lane] = uint32_t(sum[1]) | uint64_t(uint32_t(sum[3])) << 32;
    }
    into.top = top;
}

void merge(Sums& into, const Sums& other, const abi::Job& job) {
    for (int i = 0; i < rows_of(job); i++) {
        into.run_max[i] = std::max(into.run_max[i], other.run_max[i]);
        merge(into.denominators[i], other.denominators[i], 2);
        for (int part = 0; part < job.head_dim / LANES; part++)
            merge(into.out[i][part], other.out[i][part], LANES);
    }
    into.saturated |= other.saturated;
}

// As number.Wide.pack writes it.
void pack(const BlockSum& sum, int lane, uint8_t* to) {
    int32_t limbs[N_LIMBS];
    limbs_of(sum, lane, limbs);
    uint64_t limb[N_LIMBS];
    for (int j = 0; j < N_LIMBS; j++) limb[j] = uint32_t(limbs[j]) & ((1u << LIMB_BITS) - 1);
    static_assert(N_LIMBS == 4 && LIMB_BITS == 28);
    uint64_t words[2] = {limb[0] | limb[1] << 28 | limb[2] << 56,
                         limb[2] >> 8 | limb[3] << 20 | uint64_t(sum.top) << 48};
    memcpy(to, words, sizeof words);
}

struct Worker {
    Scratch scratch;
    Sums sums;
    Query query;
    int query_job;  // whose query this is
};

// While it lives, this thread rounds to nearest and takes subnormal numbers for what they are, whatever
// its owner has set: the paths round with floating point additions, and torch.set_flush_denormal or a
// library that was compiled with -ffast-math changes what these give. A new thread begins with its
// creator's settings.
class DefaultArithmetic {
  public:
    DefaultArithmetic() {
        fegetenv(&before_);
        fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { fesetenv(&before_); }

  private:
    fenv_t before_;
};

class Card {
  public:
    Card(int rows, int max_head_dim, int threads, uint64_t alone_bytes, const Path& path, Crc crc)
        : path(path), crc(crc), rows_(rows), max_head_dim_(max_head_dim), alone_bytes_(alone_bytes) {
        for (int i = 0; i < threads; i++) workers_.push_back(std::make_unique<Worker>());
        try {
            for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { serve(*workers_[i]); });
        } catch (...) {
            join();
            throw;
        }
    }

    ~Card() {
        stop();  // a queue may have begun that nobody runs to its end
        join();
    }

    // Take a queue in; nothing is computed yet. Throws if a record leaves job memory.
    void start(const uint8_t* kv, uint64_t kv_bytes, uint8_t* job, uint64_t job_bytes, uint64_t queue,
               uint64_t n_jobs) {
        give_up();
        kv_ = kv, kv_bytes_ = kv_bytes, job_ = job, job_bytes_ = job_bytes;
        jobs_.clear();
        units_.clear();
        counters = {};
        next_unit_ = 0;
        for (auto& worker : workers_) worker->query_job = -1;
        uint64_t n_tiles = 0;
        for (uint64_t i = 0; i < n_jobs; i++) {
            jobs_.push_back(std::make_unique<Job>());
            Job& it = *jobs_.back();
            memcpy(&it.fields, job_ + queue + i * sizeof(abi::Job), sizeof(abi::Job));
            check(i, "partial", it.fields.partial, sizeof(abi::PartialHeader));
            if (!legal(it.fields)) continue;
            check(i, "partial", it.fields.partial, sizeof(abi::PartialHeader) + elements_bytes(it.fields));
            check(i, "q", it.fields.q, uint64_t(it.fields.head_dim) * sizeof(abi::QRecord));
            check(i, "page_table", it.fields.page_table, uint64_t(it.fields.n_pages) * sizeof(abi::PageEntry));
            load_pages(it);
            n_tiles += it.tiles.size();
        }
        // Several units for each thread, so that all finish at about the same time.
        uint64_t unit = std::clamp<uint64_t>(n_tiles / (8 * workers_.size()), 1, UNIT_TILES);
        help_ = workers_.size() > 1 && counters.kv_beats * BEAT_BYTES >= alone_bytes_;
        if (!help_) unit = UNIT_TILES;
        for (size_t i = 0; i < jobs_.size(); i++) {
            Job& it = *jobs_[i];
            if (it.tiles.empty()) finish_illegal(it);
            it.rows = rows_of(it.fields);
            int tiles = static_cast<int>(it.tiles.size()), step = static_cast<int>(unit);
            for (int at = 0; at < tiles; at += step, it.units_left++)
                units_.push_back({static_cast<int>(i), at, std::min(step, tiles - at)});
        }
        units_left_ = units_.size();
    }

    // Let the other threads begin with the queue, before `run` does.
    void begin() {
        deadline_ = Clock::time_point::max();
        call_help();
    }

    // Compute for some time, or until `stop`. True if the queue is finished.
    bool run(double seconds) {
        deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        call_help();
        work(*workers_[0]);
        // Nobody waits for threads that have not woken up by now: they find that it is over.
        std::unique_lock<std::mutex> hold(lock_);
        open_ = false;
        idle_.wait(hold, [this] { return busy_ == 0; });
        return units_left_ == 0;
    }

    void summarise(uint64_t offset, uint32_t config_hash, uint32_t error) const {
        abi::Summary summary{};
        summary.abi_version = ABI_VERSION, summary.config_hash = config_hash, summary.error = error;
        summary.n_jobs = static_cast<uint32_t>(jobs_.size()), summary.n_failed = counters.n_failed;
        summary.kv_beats = counters.kv_beats, summary.kv_bursts = counters.kv_bursts;
        summary.partial_beats = counters.partial_beats;
        memcpy(job_ + offset, &summary, sizeof summary);
    }

    // From any thread: the run under way ends soon, and so does every later one.
    void stop() { stopping_ = true; }

    const Path& path;
    const Crc crc;
    Counters counters{};
    std::string error;

  private:
    // Wake the others, which takes as long as they need for a small queue.
    void call_help() {
        if (!help_) return;
        std::lock_guard<std::mutex> hold(lock_);
        if (open_) return;
        open_ = true, round_++;
        wake_.notify_all();
    }

    // Forget a queue that has begun and that nobody runs to its end.
    void give_up() {
        std::unique_lock<std::mutex> hold(lock_);
        open_ = false;
        deadline_ = Clock::time_point::min();
        idle_.wait(hold, [this] { return busy_ == 0; });
    }

    void join() {
        {
            std::lock_guard<std::mutex> hold(lock_);
            closing_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
        threads_.clear();
    }

    void serve(Worker& worker) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> hold(lock_);
        while (true) {
            wake_.wait(hold, [&] { return closing_ || (open_ && round_ != seen); });
            if (closing_) return;
            seen = round_, busy_++;
            hold.unlock();
            work(worker);
            hold.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    void work(Worker& worker) {
        DefaultArithmetic during;
        while (!stopping_ && Clock::now() < deadline_.load()) {
            size_t i = next_unit_.fetch_add(1);
            if (i >= units_.size()) {
                next_unit_ = units_.size();
                return;
            }
            compute(worker, units_[i]);
            units_left_--;
        }
    }

    void check(uint64_t i, const char* what, uint64_t offset, uint64_t bytes) const {
        if (offset + bytes > job_bytes_)
            throw std::out_of_range("job " + std::to_string(i) + ": " + what + " at offset " +
                                    std::to_string(offset) + ", " + std::to_string(bytes) +
                                    " bytes, leaves job memory");
    }

    bool legal(const abi::Job& job) const {
        const uint64_t n_tiles = uint64_t(job.n_pages) * ((job.page_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
        return abi::legal(job, n_tiles, rows_, max_head_dim_);
    }

    void load_pages(Job& job) {
        const uint64_t page_bytes = 2 * uint64_t(part_bytes(job.fields));
        const int step = tile_tokens(job.fields), parts = job.fields.head_dim / LANES;
        for (uint32_t n = 0; n < job.fields.n_pages; n++) {
            abi::PageEntry entry;
            memcpy(&entry, job_ + job.fields.page_table + n * sizeof entry, sizeof entry);
            Page page = {entry.address, static_cast<int>(entry.page_len), 0, entry.crc_k, entry.crc_v};
            if (!abi::legal(entry, job.fields.page_tokens))
                page.address = 0, page.tokens = 0, page.flags = STATUS_ILLEGAL_JOB;
            if (page.address > kv_bytes_ || page_bytes > kv_bytes_ - page.address)
                page.address = 0, page.tokens = 0, page.flags |= STATUS_BUS_ERROR;
            for (int first = 0; first < std::max(page.tokens, 1); first += step) {
                int tokens = std::min(step, page.tokens - first);
                int k_beats = std::max(1, (tokens + LANES - 1) / LANES) * job.fields.head_dim;
                account(uint64_t(first / LANES) * job.fields.head_dim, k_beats);
                for (int part = 0; part < parts; part++)
                    account((uint64_t(job.fields.head_dim / LANES) + part) * job.fields.page_tokens + first,
                            std::max(1, tokens));
                job.tiles.push_back({n, static_cast<uint16_t>(first), static_cast<uint16_t>(tokens)});
            }
            job.pages.push_back(page);
        }
        job.checks.resize(job.tiles.size());
    }

    // Beats and bursts of one span of a page, in beats; a burst ends at each 4096-byte boundary.
    void account(uint64_t first, uint64_t beats) {
        constexpr uint64_t burst = BURST_BYTES / BEAT_BYTES;
        counters.kv_beats += beats;
        counters.kv_bursts += (first + beats - 1) / burst - first / burst + 1;
    }

    void load_query(const Job& job, Query& query) const {
        const abi::Job& fields = job.fields;
        query.head_dim = fields.head_dim;
        query.kv_type = fields.kv_type, query.page_tokens = fields.page_tokens;
        query.mantissa = fields.score_mantissa;
        query.shift = fields.score_shift;
        query.largest_exponent = INT32_MIN;
        query.heads = query.scored_rows = fields.group_size;
        std::fill_n(query.weight_sum, job.rows, 0.0);
        for (int r = 0; r < fields.head_dim; r++) {
            abi::QRecord record;
            memcpy(&record, job_ + fields.q + r * sizeof record, sizeof record);
            const int exponent = low_bits(record.exponent, Q_EXPONENT_BITS);
            query.exponent[r] = exponent;
            query.largest_exponent = std::max(query.largest_exponent, exponent);
            for (int i = 0; i < job.rows; i++) {
                query.weight[i][r] = low_bits(record.weight[i], WEIGHT_BITS);
                query.weight_52[i][r] = static_cast<int64_t>(query.weight[i][r]) & ((int64_t(1) << 52) - 1);
                query.weight_sum[i] += query.weight[i][r];
                if (query.weight[i][r] != 0) query.scored_rows = std::max(query.scored_rows, i + 1);
            }
        }
        const int mantissa_bits = (fields.kv_type == KV_FP16 ? FP16 : BF16).mantissa_bits;
        for (int r = 0; r < fields.head_dim; r++) {
            // What does not fit is below the smallest element anyway.
            int below = (query.exponent[r] - query.largest_exponent) * (1 << mantissa_bits);
            query.below_largest[r] = uint32_t(uint16_t(std::max(below, INT16_MIN))) * 0x10001u;
        }
    }

    void compute(Worker& worker, const Unit& unit) {
        Job& job = *jobs_[unit.job];
        if (worker.query_job != unit.job) load_query(job, worker.query);
        worker.query_job = unit.job;
        reset(worker.sums, job.fields);
        for (int i = unit.first_tile; i < unit.first_tile + unit.n_tiles; i++) compute(worker, job, i);
        bool last;
        {
            std::lock_guard<std::mutex> hold(job.lock);
            last = --job.units_left == 0;
            if (job.sums)
                merge(*job.sums, worker.sums, job.fields);
            else if (!last)
                job.sums = std::make_unique<Sums>(worker.sums);
        }
        if (last) finish(job, job.sums ? *job.sums : worker.sums);
    }

    void compute(Worker& worker, Job& job, int i) {
        const TileRef& at = job.tiles[i];
        const Page& page = job.pages[at.page];
        const int head_dim = job.fields.head_dim;
        TileCheck& check = job.checks[i];
        Tile tile{};
        tile.tokens = at.tokens;
        tile.crc = crc;
        const uint8_t* k = kv_ + page.address + uint64_t(at.first) * head_dim * KV_ELEMENT_BYTES;
        const uint8_t* v = kv_ + page.address + part_bytes(job.fields) + uint64_t(at.first) * BEAT_BYTES;
        tile.k = reinterpret_cast<const uint16_t*>(k);
        tile.v = reinterpret_cast<const uint16_t*>(v);
        if (i + 1 < static_cast<int>(job.tiles.size())) {
            const TileRef& next = job.tiles[i + 1];
            tile.next_k = reinterpret_cast<const uint16_t*>(kv_ + job.pages[next.page].address) + next.first * head_dim;
        }
        path.scores(worker.query, tile, worker.scratch, worker.sums);
        path.values(worker.query, tile, worker.scratch, worker.sums);
        check = {tile.crc_k, tile.crc_v, tile.non_finite};
    }

    // The flags of the job's pages; the first page to blame.
    uint32_t judge(Job& job, uint32_t& bad_page) const {
        const int head_dim = job.fields.head_dim;
        std::vector<uint32_t> crc_k(job.pages.size()), crc_v(job.pages.size());
        for (size_t i = 0; i < job.tiles.size(); i++) {
            const TileRef& at = job.tiles[i];
            const TileCheck& check = job.checks[i];
            if (check.non_finite) job.pages[at.page].flags |= STATUS_NON_FINITE;
            auto append = [&](uint32_t& crc, uint32_t more, uint64_t bytes) {
                crc = at.first ? crc_multiply(crc, crc_power(8 * bytes)) ^ more : more;
            };
            const uint64_t blocks = (at.tokens + LANES - 1) / LANES;
            append(crc_k[at.page], check.crc_k, blocks * head_dim * BEAT_BYTES);
            append(crc_v[at.page], check.crc_v, uint64_t(at.tokens) * BEAT_BYTES * (head_dim / LANES));
        }
        uint32_t flags = 0;
        bad_page = NO_PAGE;
        for (uint32_t n = 0; n < job.pages.size(); n++) {
            Page& page = job.pages[n];
            if (page.tokens && crc_k[n] != page.crc_k) page.flags |= STATUS_BAD_CRC_K;
            if (page.tokens && crc_v[n] != page.crc_v) page.flags |= STATUS_BAD_CRC_V;
            flags |= page.flags;
            if (page.flags && bad_page == NO_PAGE) bad_page = n;
        }
        return flags;
    }

    void finish(Job& job, const Sums& sums) {
        abi::PartialHeader header{};
        header.status = STATUS_DONE | judge(job, header.bad_page) | (sums.saturated ? STATUS_SATURATED : 0);
        for (const Page& page : job.pages) header.n_tokens += page.tokens;
        header.tag = job.fields.tag;
        std::fill(std::begin(header.run_max), std::end(header.run_max), RUN_MAX_EMPTY);
        std::copy_n(sums.run_max, job.rows, header.run_max);
        uint8_t* partial = job_ + job.fields.partial;
        memcpy(partial, &header, sizeof header);
        uint8_t* to = partial + sizeof header;
        const uint64_t bytes = elements_bytes(job.fields);
        for (int lane = 0; lane < 2; lane++)
            for (int i = 0; i < job.rows; i++, to += WIDE_BYTES) pack(sums.denominators[i], lane, to);
        for (int channel = 0; channel < job.fields.head_dim; channel++)
            for (int i = 0; i < job.rows; i++, to += WIDE_BYTES)
                pack(sums.out[i][channel / LANES], channel % LANES, to);
        memset(to, 0, partial + sizeof header + bytes - to);
        count(header.status, (sizeof header + bytes) / BEAT_BYTES);
        job.sums.reset();
    }

    void finish_illegal(Job& job) {
        abi::PartialHeader header{};
        header.status = STATUS_DONE | STATUS_ILLEGAL_JOB;
        header.bad_page = NO_PAGE;
        header.tag = job.fields.tag;
        std::fill(std::begin(header.run_max), std::end(header.run_max), RUN_MAX_EMPTY);
        memcpy(job_ + job.fields.partial, &header, sizeof header);
        count(header.status, sizeof header / BEAT_BYTES);
    }

    void count(uint32_t status, uint64_t beats) {
        std::lock_guard<std::mutex> hold(lock_);
        counters.partial_beats += beats;
        counters.n_failed += status != STATUS_DONE;
    }

    const int rows_, max_head_dim_;
    const uint64_t alone_bytes_;
    const uint8_t* kv_ = nullptr;
    uint8_t* job_ = nullptr;
    uint64_t kv_bytes_ = 0, job_bytes_ = 0;
    std::vector<std::unique_ptr<Job>> jobs_;
    std::vector<Unit> units_;
    std::atomic<size_t> next_unit_{0}, units_left_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<Clock::time_point> deadline_{};

    std::vector<std::unique_ptr<Worker>> workers_;  // the first belongs to the caller of run()
    std::vector<std::thread> threads_;
    std::mutex lock_;
    std::condition_variable wake_, idle_;
    uint64_t round_ = 0;
    int busy_ = 0;  // threads at work, beside the caller's
    bool help_ = false;  // wanted for this queue
    bool open_ = false, closing_ = false;
};

const Path* find_path(const std::string& name) {
    for (const Path* path : {&IFMA, &AVX512, &AVX2, &PORTABLE})
        if (path->supported() && (name == "auto" || name == path->name)) return path;
    return nullptr;
}

Crc find_crc(const Path& path) {
    if ((&path == &IFMA || &path == &AVX512) && crc_avx512_supported()) return crc_avx512;
    if (&path != &PORTABLE && crc_sse42_supported()) return crc_sse42;
    return crc_portable;
}

}  // namespace
}  // namespace twin

using twin::Card;

extern "C" {

// What this library was compiled from.
const char* twin_identity() { return TWIN_IDENTITY; }

// The name of the path that "auto" or a name stands for; null if this processor does not have it.
const char* twin_path(const char* name) {
    const twin::Path* path = twin::find_path(name);
    return path ? path->name : nullptr;
}

uint32_t twin_crc32c(const char* path, uint32_t crc, const uint8_t* data, uint64_t n) {
    return twin::find_crc(*twin::find_path(path))(crc, data, n);
}

// Null if there is no memory or no thread.
void* twin_open(int rows, int max_head_dim, int threads, uint64_t alone_bytes, const char* name) try {
    const twin::Path& path = *twin::find_path(name);
    return new Card(rows, max_head_dim, threads, alone_bytes, path, twin::find_crc(path));
} catch (const std::exception&) {
    return nullptr;
}

void twin_close(void* card) { delete static_cast<Card*>(card); }

const char* twin_error(void* card) { return static_cast<Card*>(card)->error.c_str(); }

// 0, or -1 with an error.
int twin_start(void* card, const uint8_t* kv, uint64_t kv_bytes, uint8_t* job, uint64_t job_bytes,
               uint64_t queue, uint64_t n_jobs) try {
    static_cast<Card*>(card)->start(kv, kv_bytes, job, job_bytes, queue, n_jobs);
    return 0;
} catch (const std::exception& problem) {
    static_cast<Card*>(card)->error = problem.what();
    return -1;
}

// Let other threads begin with the queue that was started.
void twin_begin(void* card) { static_cast<Card*>(card)->begin(); }

// 1 when the queue is finished, 0 after so many seconds or after twin_stop.
int twin_run(void* card, double seconds) { return static_cast<Card*>(card)->run(seconds); }

// From any thread.
void twin_stop(void* card) { static_cast<Card*>(card)->stop(); }

// Write the summary of the queue that is finished.
void twin_summary(void* card, uint64_t offset, uint32_t config_hash, uint32_t error) {
    static_cast<Card*>(card)->summarise(offset, config_hash, error);
}

}  // extern "C"
