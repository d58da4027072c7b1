// SPDX-License-Identifier: Apache-2.0
// The world around the simulated kernel: two memories behind AXI4, a driver on AXI4-Lite.
//
// Strict on purpose. What AXI4 forbids, and what a memory on a real card would not show at once (a
// write to a place that belongs to no partial, an ap_done before the last write response), ends the
// run with a message. The memories have latency and, on request, pause at random on every channel.
//
// Compiled together with the verilated kernel into a shared library; `rtl.py` is its only caller. What
// host and card agree on (BEAT_BYTES, ...) comes from `nearkv_hw.abi` through the generated `abi.h`.

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "Vnearkv.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

namespace {

constexpr int AXI_SIZE = __builtin_ctz(BEAT_BYTES);  // AxSIZE of a full-width beat
constexpr int AXI_INCR = 1;
constexpr int OKAY = 0, SLVERR = 2, DECERR = 3;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw std::runtime_error(text);
}

// Random pauses: mostly of a few cycles, now and then long enough to fill or drain every FIFO.
class Pauses {
  public:
    void configure(uint64_t seed, double share) {
        state_ = seed * 0x9E3779B97F4A7C15u + 0x1234567;
        constexpr double mean_cycles = (15 * 2.5 + 1 * 100) / 16;
        // A cycle begins a pause with this probability, so that pauses take `share` of all cycles.
        double begin = share / (mean_cycles * (1 - share) + share);
        threshold_ = static_cast<uint64_t>(begin * 18446744073709549568.0);  // 2^64 - 2^11
        left_ = 0;
    }
    bool active() const { return threshold_ != 0; }
    bool paused() {
        if (!threshold_) return false;
        if (left_) return left_--, true;
        if (random() >= threshold_) return false;
        uint64_t r = random();
        left_ = (r & 15) ? (r >> 8) % 4 : (r >> 8) % 200;  // this cycle counts as well
        return true;
    }
    uint64_t random() {
        state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
        return state_ * 0x2545F4914F6CDD1Du;
    }

  private:
    uint64_t state_ = 1, threshold_ = 0, left_ = 0;
};

struct Memory {
    const char* name = "";
    uint8_t* data = nullptr;
    uint64_t base = 0, bytes = 0;

    bool holds(uint64_t address) const {
        return address >= base && address - base + BEAT_BYTES <= bytes;
    }
};

struct Settings {
    uint64_t read_latency = 0, write_latency = 0, outstanding = 16;
};

// One DRAM behind both masters: a beat a cycle at best, shared; refresh; rows that must be opened; the
// bus turned round for writes. In cycles of the kernel. Without it each port has a bus of its own.
class Dram {
  public:
    struct Timing {
        uint64_t refresh_interval, refresh_cycles, row_bytes, banks, activate_cycles,
            row_cycle_cycles, turnaround_cycles;
    };
    uint64_t refresh_lost = 0, write_lost = 0;  // cycles without read data for these reasons

    void configure(const Timing& timing) {
        timing_ = timing;
        banks_.assign(timing.banks, {});
    }
    bool enabled() const { return !banks_.empty(); }

    // A read burst is accepted: the cycle from which its row can deliver.
    uint64_t open_row(uint64_t address, uint64_t now) {
        uint64_t place = address / timing_.row_bytes;
        Bank& bank = banks_[place % timing_.banks];
        uint64_t row = place / timing_.banks;
        if (!bank.open || bank.row != row) {
            uint64_t begin = bank.open ? std::max(now, bank.opened + timing_.row_cycle_cycles) : now;
            bank = {true, row, begin};
        }
        return std::max(now, bank.opened + timing_.activate_cycles);
    }

    // A whole write burst goes to the memory when its data is there.
    void write(uint64_t beats, uint64_t now) {
        uint64_t at = std::max(now, writing_until_);
        for (uint64_t left = beats + 2 * timing_.turnaround_cycles; left; ++at)
            if (at % timing_.refresh_interval >= timing_.refresh_cycles) --left;
        writing_until_ = at;
    }

    bool free(uint64_t now) const {
        return now != last_read_ && now >= writing_until_ &&
               now % timing_.refresh_interval >= timing_.refresh_cycles;
    }

    // Whether the next read beat may move in this cycle; one may.
    bool read(uint64_t now) {
        if (now == last_read_) return false;
        if (now % timing_.refresh_interval < timing_.refresh_cycles) {
            if (now != lost_) ++refresh_lost, lost_ = now;
            return false;
        }
        if (now < writing_until_) {
            if (now != lost_) ++write_lost, lost_ = now;
            return false;
        }
        last_read_ = now;
        return true;
    }

  private:
    struct Bank {
        bool open = false;
        uint64_t row = 0, opened = 0;
    };
    Timing timing_{};
    std::vector<Bank> banks_;
    uint64_t writing_until_ = 0, last_read_ = ~0ull, lost_ = ~0ull;
};

// A channel driven by the kernel: once valid, it must hold until ready (IHI 0022, A3.2.1).
template <typename Payload>
class Held {
  public:
    void check(const char* channel, bool valid, bool ready, const Payload& payload) {
        if (waiting_ && !valid) fail("%s: valid dropped before ready", channel);
        if (waiting_ && memcmp(&payload, &payload_, sizeof(Payload)) != 0)
            fail("%s: the payload changed while valid waited for ready", channel);
        waiting_ = valid && !ready;
        if (waiting_) payload_ = payload;
    }
    void reset() { waiting_ = false; }

  private:
    bool waiting_ = false;
    Payload payload_{};
};

struct Address {
    uint64_t address;
    uint32_t length, size, burst, id;
};

void check_burst(const char* channel, const Address& a, size_t under_way) {
    if (under_way >= OUTSTANDING_BURSTS)
        fail("%s: more than %d bursts under way", channel, OUTSTANDING_BURSTS);
    if (a.id) fail("%s: id is %u, and was 0 before", channel, a.id);
    uint64_t bytes = (uint64_t(a.length) + 1) * BEAT_BYTES;
    if (a.size != AXI_SIZE) fail("%s: size is %u, not %d (full width)", channel, a.size, AXI_SIZE);
    if (a.burst != AXI_INCR) fail("%s: burst type is %u, not INCR", channel, a.burst);
    if (a.address % BEAT_BYTES)
        fail("%s: address 0x%" PRIx64 " is not a multiple of %d", channel, a.address, BEAT_BYTES);
    if (a.address % BURST_BYTES + bytes > BURST_BYTES)
        fail("%s: burst of %u beats at 0x%" PRIx64 " crosses a boundary of %d bytes", channel,
             a.length + 1, a.address, BURST_BYTES);
}

struct Beat {
    uint64_t address;
    std::array<uint8_t, BEAT_BYTES> data;
    uint64_t strobe;
    bool last;
};

// The read channels of one master. `sample` looks at settled signals before a rising clock edge,
// `drive` sets what the kernel sees after it.
struct Reader {
    const char* name;
    CData &arid, &arvalid, &arready, &arlen, &arsize, &arburst;
    QData& araddr;
    CData &rid, &rvalid, &rready, &rresp, &rlast;
    VlWide<BEAT_BYTES / 4>& rdata;

    const Memory* memory = nullptr;
    Dram* dram = nullptr;
    Settings settings{};
    uint64_t fault_begin = 0, fault_end = 0;  // offsets answered with SLVERR
    Pauses ar_pauses, r_pauses;
    uint64_t bursts = 0, beats = 0;
    uint64_t idle = 0;  // cycles from the first to the last beat in which it waited to be asked

    struct Burst {
        uint64_t address, left, ready_cycle;
        uint32_t id;
    };
    std::deque<Burst> queue;
    Held<Address> held;
    std::string ar_name = std::string(name) + ".ar";

    bool sample(uint64_t now) {
        bool moved = false;
        if (arvalid || ar_was_valid_) {
            Address a{araddr, arlen, arsize, arburst, arid};
            held.check(ar_name.c_str(), arvalid, arready, a);
            ar_was_valid_ = arvalid && !arready;
            if (arvalid && arready) {
                check_burst(ar_name.c_str(), a, queue.size());
                uint64_t jitter = ar_pauses.active() ? ar_pauses.random() % 32 : 0;
                uint64_t ready = now + settings.read_latency + jitter;
                if (dram->enabled()) ready = dram->open_row(a.address, now) + settings.read_latency;
                queue.push_back({a.address, a.length + 1u, ready, a.id});
                ++bursts;
                moved = true;
            }
        }
        if (rvalid && rready) {
            Burst& head = queue.front();
            head.address += BEAT_BYTES;
            if (--head.left == 0) queue.pop_front();
            ++beats;
            offered_ = false;
            moved = true;
        }
        return moved;
    }

    void drive(uint64_t now) {
        arready = queue.size() < settings.outstanding && !ar_pauses.paused();
        if (offered_) return;
        if (queue.empty() || queue.front().ready_cycle > now || r_pauses.paused() ||
            (dram->enabled() && !dram->read(now))) {
            // The memory could have delivered, had it been asked in time.
            if (queue.empty() || queue.front().ready_cycle > now)
                if (!dram->enabled() || dram->free(now)) ++idle_running_;
            if (rvalid) {
                rvalid = 0;
                // Nobody may look at these without valid.
                rdata[0] = rdata[BEAT_BYTES / 4 - 1] = 0xDEADBEEF;
                rlast = rresp = 1;
            }
            return;
        }
        const Burst& head = queue.front();
        if (!beats) idle_running_ = 0;
        idle = idle_running_;
        rvalid = offered_ = true;
        rid = head.id;
        rlast = head.left == 1;
        uint64_t offset = head.address - memory->base;
        if (!memory->holds(head.address)) {
            rresp = DECERR;
            memset(rdata.data(), 0, BEAT_BYTES);
        } else {
            rresp = offset >= fault_begin && offset < fault_end ? SLVERR : OKAY;
            memcpy(rdata.data(), memory->data + offset, BEAT_BYTES);
        }
    }

    void reset() {
        queue.clear();
        held.reset();
        ar_was_valid_ = offered_ = false;
        arready = rvalid = 0;
    }

    bool ar_was_valid_ = false, offered_ = false;
    uint64_t idle_running_ = 0;
};

// The write channels of one master.
struct Writer {
    const char* name;
    CData &awid, &awvalid, &awready, &awlen, &awsize, &awburst;
    QData& awaddr;
    CData &wvalid, &wready, &wlast;
    VlWide<BEAT_BYTES / 4>& wdata;
    QData& wstrb;
    CData &bid, &bvalid, &bready, &bresp;

    const Memory* memory = nullptr;
    Dram* dram = nullptr;
    Settings settings{};
    std::vector<uint8_t> allowed;  // one flag per beat of memory
    Pauses aw_pauses, w_pauses, b_pauses;
    uint64_t bursts = 0, beats = 0;

    struct Burst {
        uint64_t address, left;
        uint32_t id;
        std::vector<Beat> data;
        uint64_t ready_cycle;
    };
    std::deque<Burst> open, answered;  // without all their data; waiting for the response
    std::deque<Beat> data;             // W may run ahead of AW
    Held<Address> aw_held;
    Held<Beat> w_held;
    std::string aw_name = std::string(name) + ".aw", w_name = std::string(name) + ".w";

    bool sample(uint64_t now) {
        bool moved = false;
        if (awvalid || aw_was_valid_) {
            Address a{awaddr, awlen, awsize, awburst, awid};
            aw_held.check(aw_name.c_str(), awvalid, awready, a);
            aw_was_valid_ = awvalid && !awready;
            if (awvalid && awready) {
                check_burst(aw_name.c_str(), a, open.size() + answered.size());
                open.push_back({a.address, a.length + 1u, a.id, {}, 0});
                ++bursts;
                moved = true;
            }
        }
        if (wvalid || w_was_valid_) {
            Beat beat;
            memset(&beat, 0, sizeof beat);  // padding takes part in the comparison
            memcpy(beat.data.data(), wdata.data(), BEAT_BYTES);
            beat.strobe = wstrb;
            beat.last = wlast;
            w_held.check(w_name.c_str(), wvalid, wready, beat);
            w_was_valid_ = wvalid && !wready;
            if (wvalid && wready) {
                if (~wstrb) fail("%s: not every byte of a beat is written", w_name.c_str());
                data.push_back(beat);
                ++beats;
                moved = true;
            }
        }
        if (bvalid && bready) {
            answered.pop_front();
            offered_ = false;
            moved = true;
        }
        while (!open.empty() && !data.empty()) take(now);
        return moved;
    }

    void drive(uint64_t now) {
        awready = open.size() + answered.size() < settings.outstanding && !aw_pauses.paused();
        wready = data.size() < BURST_BYTES / BEAT_BYTES && !w_pauses.paused();
        if (offered_) return;
        bvalid = 0;
        if (answered.empty() || answered.front().ready_cycle > now || b_pauses.paused()) return;
        const Burst& head = answered.front();
        bvalid = offered_ = true;
        bid = head.id;
        bresp = OKAY;
        // Only the response promises that the data can be read.
        for (const Beat& beat : head.data) {
            uint8_t* to = memory->data + (beat.address - memory->base);
            for (int i = 0; i < BEAT_BYTES; ++i)
                if (beat.strobe >> i & 1) to[i] = beat.data[i];
        }
    }

    bool idle() const { return open.empty() && answered.empty() && data.empty(); }

    void reset() {
        open.clear(), answered.clear(), data.clear();
        aw_held.reset(), w_held.reset();
        aw_was_valid_ = w_was_valid_ = offered_ = false;
        awready = wready = bvalid = 0;
    }

    bool aw_was_valid_ = false, w_was_valid_ = false, offered_ = false;

    void take(uint64_t now) {
        Burst& burst = open.front();
        Beat beat = data.front();
        data.pop_front();
        beat.address = burst.address;
        if (!memory->holds(beat.address))
            fail("%s: write to 0x%" PRIx64 ", outside %s memory", w_name.c_str(), beat.address,
                 memory->name);
        uint64_t offset = beat.address - memory->base;
        if (!allowed[offset / BEAT_BYTES])
            fail("%s: write to %s-memory offset 0x%" PRIx64
                 ", which belongs to no partial of the queue, nor to the summary",
                 w_name.c_str(), memory->name, offset);
        if (beat.last != (burst.left == 1))
            fail("%s: wlast is %d with %" PRIu64 " beats of the burst to come", w_name.c_str(),
                 beat.last, burst.left - 1);
        burst.data.push_back(beat);
        burst.address += BEAT_BYTES;
        if (--burst.left) return;
        uint64_t jitter = b_pauses.active() ? b_pauses.random() % 32 : 0;
        if (dram->enabled()) dram->write(burst.data.size(), now);
        burst.ready_cycle = now + settings.write_latency + jitter;
        answered.push_back(std::move(burst));
        open.pop_front();
    }
};

// The kernel's answers on AXI4-Lite: held until taken, none that nothing asked for.
class Answers {
  public:
    void sample(const Vnearkv& top) {
        if (top.s_axi_control_rvalid || reading_) {
            if (top.s_axi_control_rvalid && !reading_)
                fail("s_axi_control.r: an answer that nothing asked for");
            r_.check("s_axi_control.r", top.s_axi_control_rvalid, top.s_axi_control_rready,
                     {top.s_axi_control_rdata, top.s_axi_control_rresp});
            if (top.s_axi_control_rvalid && top.s_axi_control_rready) reading_ = false;
        }
        if (top.s_axi_control_bvalid || (addressed_ && given_)) {
            if (top.s_axi_control_bvalid && !(addressed_ && given_))
                fail("s_axi_control.b: an answer that nothing asked for");
            b_.check("s_axi_control.b", top.s_axi_control_bvalid, top.s_axi_control_bready,
                     {top.s_axi_control_bresp});
            if (top.s_axi_control_bvalid && top.s_axi_control_bready) addressed_ = given_ = false;
        }
        reading_ |= top.s_axi_control_arvalid && top.s_axi_control_arready;
        addressed_ |= top.s_axi_control_awvalid && top.s_axi_control_awready;
        given_ |= top.s_axi_control_wvalid && top.s_axi_control_wready;
    }
    void reset() { r_.reset(), b_.reset(), reading_ = addressed_ = given_ = false; }

  private:
    struct R { uint32_t data, response; };
    struct B { uint32_t response; };
    Held<R> r_;
    Held<B> b_;
    bool reading_ = false, addressed_ = false, given_ = false;
};

class Card {
  public:
    Card()
        : context_(new VerilatedContext),
          top_(new Vnearkv(context_.get())),
          kv_{"m_axi_kv", top_->m_axi_kv_arid, top_->m_axi_kv_arvalid, top_->m_axi_kv_arready,
              top_->m_axi_kv_arlen, top_->m_axi_kv_arsize, top_->m_axi_kv_arburst,
              top_->m_axi_kv_araddr, top_->m_axi_kv_rid, top_->m_axi_kv_rvalid,
              top_->m_axi_kv_rready, top_->m_axi_kv_rresp, top_->m_axi_kv_rlast,
              top_->m_axi_kv_rdata},
          job_{"m_axi_job", top_->m_axi_job_arid, top_->m_axi_job_arvalid,
               top_->m_axi_job_arready, top_->m_axi_job_arlen, top_->m_axi_job_arsize,
               top_->m_axi_job_arburst, top_->m_axi_job_araddr, top_->m_axi_job_rid,
               top_->m_axi_job_rvalid, top_->m_axi_job_rready, top_->m_axi_job_rresp,
               top_->m_axi_job_rlast, top_->m_axi_job_rdata},
          out_{"m_axi_job", top_->m_axi_job_awid, top_->m_axi_job_awvalid,
               top_->m_axi_job_awready, top_->m_axi_job_awlen, top_->m_axi_job_awsize,
               top_->m_axi_job_awburst, top_->m_axi_job_awaddr, top_->m_axi_job_wvalid,
               top_->m_axi_job_wready, top_->m_axi_job_wlast, top_->m_axi_job_wdata,
               top_->m_axi_job_wstrb, top_->m_axi_job_bid, top_->m_axi_job_bvalid,
               top_->m_axi_job_bready, top_->m_axi_job_bresp} {
        kv_.memory = &kv_memory_;
        job_.memory = out_.memory = &job_memory_;
        kv_.dram = job_.dram = out_.dram = &dram_;
    }

    ~Card() {
#if VM_TRACE
        if (trace_) trace_->close();
#endif
        top_->final();
    }

    std::string error;
    std::string text;

    void configure(uint64_t read_latency, uint64_t write_latency, uint64_t outstanding,
                   uint64_t seed, double stalls, uint64_t quiet_cycles) {
        kv_.settings = job_.settings = out_.settings = {read_latency, write_latency, outstanding};
        quiet_cycles_ = quiet_cycles;
        Pauses* all[] = {&kv_.ar_pauses, &kv_.r_pauses, &job_.ar_pauses, &job_.r_pauses,
                         &out_.aw_pauses, &out_.w_pauses, &out_.b_pauses, &control_pauses_};
        for (Pauses* pauses : all) pauses->configure(++seed * 64, stalls);
    }

    void dram(const Dram::Timing& timing) { dram_.configure(timing); }

    void trace([[maybe_unused]] const char* path) {
#if VM_TRACE
        context_->traceEverOn(true);
        trace_.reset(new VerilatedVcdC);
        top_->trace(trace_.get(), 99);
        trace_->open(path);
#endif
    }

    void memories(uint8_t* kv, uint64_t kv_base, uint64_t kv_bytes, uint8_t* job,
                  uint64_t job_base, uint64_t job_bytes) {
        kv_memory_ = {"kv", kv, kv_base, kv_bytes};
        job_memory_ = {"job", job, job_base, job_bytes};
        out_.allowed.assign(job_bytes / BEAT_BYTES, 0);
    }

    void allow(uint64_t offset, uint64_t bytes) {
        for (uint64_t at = offset; at < offset + bytes; at += BEAT_BYTES)
            if (at / BEAT_BYTES < out_.allowed.size()) out_.allowed[at / BEAT_BYTES] = 1;
    }

    void fault(uint64_t begin, uint64_t end) { kv_.fault_begin = begin, kv_.fault_end = end; }

    void reset() {
        top_->ap_rst_n = 0;
        kv_.reset(), job_.reset(), out_.reset(), answers_.reset();
        top_->s_axi_control_awvalid = top_->s_axi_control_wvalid = top_->s_axi_control_arvalid = 0;
        top_->s_axi_control_bready = top_->s_axi_control_rready = 0;
        auto quiet = [this] {  // IHI 0022, A3.1.2: up to the first edge after the reset
            if (top_->m_axi_kv_arvalid || top_->m_axi_job_arvalid || top_->m_axi_job_awvalid ||
                top_->m_axi_job_wvalid || top_->s_axi_control_bvalid || top_->s_axi_control_rvalid)
                fail("a valid is high during reset");
        };
        for (int i = 0; i < 16; ++i) {
            top_->ap_clk = 0;
            settle();
            // What a simulation begins with is no state of the kernel's.
            if (cycle_ > 2) quiet();
            edge();
        }
        // The kernel may register its reset a few times; no host is faster than this.
        top_->ap_rst_n = 1;
        top_->ap_clk = 0;
        settle();
        quiet();
        for (int i = 0; i < 16; ++i) tick();
        moved_cycle_ = cycle_;
    }

    void write(uint32_t offset, uint32_t value) {
        top_->s_axi_control_awaddr = offset;
        top_->s_axi_control_wdata = value;
        top_->s_axi_control_wstrb = 15;
        bool address = false, data = false;
        for (uint64_t start = cycle_; !(address && data);) {
            top_->s_axi_control_awvalid = !address && !hesitates(top_->s_axi_control_awvalid);
            top_->s_axi_control_wvalid = !data && !hesitates(top_->s_axi_control_wvalid);
            settle();
            address |= top_->s_axi_control_awvalid && top_->s_axi_control_awready;
            data |= top_->s_axi_control_wvalid && top_->s_axi_control_wready;
            tick();
            in_time(start, "write", offset, "awready and wready");
        }
        top_->s_axi_control_awvalid = top_->s_axi_control_wvalid = 0;
        bool seen = false;
        for (uint64_t start = cycle_;;) {
            top_->s_axi_control_bready = !hesitates(false);
            settle();
            bool done = top_->s_axi_control_bready && top_->s_axi_control_bvalid;
            if (seen && !top_->s_axi_control_bvalid) fail("s_axi_control: bvalid dropped");
            seen = top_->s_axi_control_bvalid;
            int response = top_->s_axi_control_bresp;
            tick();
            if (done) {
                top_->s_axi_control_bready = 0;
                if (response != OKAY) fail("s_axi_control: write to 0x%x got bresp %d", offset, response);
                return;
            }
            in_time(start, "write", offset, "bvalid");
        }
    }

    uint32_t read(uint32_t offset) {
        top_->s_axi_control_araddr = offset;
        for (uint64_t start = cycle_;;) {
            top_->s_axi_control_arvalid = !hesitates(top_->s_axi_control_arvalid);
            settle();
            bool done = top_->s_axi_control_arvalid && top_->s_axi_control_arready;
            tick();
            if (done) break;
            in_time(start, "read", offset, "arready");
        }
        top_->s_axi_control_arvalid = 0;
        bool seen = false;
        for (uint64_t start = cycle_;;) {
            top_->s_axi_control_rready = !hesitates(false);
            settle();
            bool done = top_->s_axi_control_rready && top_->s_axi_control_rvalid;
            if (seen && !top_->s_axi_control_rvalid) fail("s_axi_control: rvalid dropped");
            seen = top_->s_axi_control_rvalid;
            uint32_t value = top_->s_axi_control_rdata;
            int response = top_->s_axi_control_rresp;
            tick();
            if (done) {
                top_->s_axi_control_rready = 0;
                if (response != OKAY) fail("s_axi_control: read of 0x%x got rresp %d", offset, response);
                return value;
            }
            in_time(start, "read", offset, "rvalid");
        }
    }

    // Poll a register until a bit of `mask` is set; 0 if that did not happen within `cycles`.
    int wait(uint32_t offset, uint32_t mask, uint64_t cycles, uint64_t interval) {
        for (uint64_t end = cycle_ + cycles; cycle_ < end;) {
            for (uint64_t i = 0; i < interval; ++i) tick();
            if (read(offset) & mask) return 1;
            if (cycle_ - moved_cycle_ > quiet_cycles_)
                fail("nothing has moved on m_axi_kv and m_axi_job for %" PRIu64 " cycles",
                     quiet_cycles_);
        }
        return 0;
    }

    // Nothing may be under way once ap_done has been seen.
    void finish() {
        if (!kv_.queue.empty() || !job_.queue.empty())
            fail("ap_done came with %zu read bursts still under way",
                 kv_.queue.size() + job_.queue.size());
        if (!out_.idle()) fail("ap_done came before the response to the last write");
        uint64_t bursts = kv_.bursts + job_.bursts + out_.bursts;
        for (int i = 0; i < 32; ++i) tick();
        if (kv_.bursts + job_.bursts + out_.bursts != bursts) fail("a burst began after ap_done");
    }

    const char* state() {
        char line[1024];
        snprintf(line, sizeof line,
                 "cycle=%" PRIu64 " quiet_cycles=%" PRIu64 " kv_bursts=%" PRIu64
                 " kv_beats=%" PRIu64 " kv_outstanding=%zu kv_arvalid=%d kv_rvalid=%d kv_rready=%d"
                 " job_bursts=%" PRIu64 " job_beats=%" PRIu64
                 " job_outstanding=%zu job_rvalid=%d job_rready=%d out_bursts=%" PRIu64
                 " out_beats=%" PRIu64 " out_outstanding=%zu out_awvalid=%d out_wvalid=%d"
                 " dram_refresh_lost=%" PRIu64 " dram_write_lost=%" PRIu64 " kv_idle=%" PRIu64,
                 cycle_, cycle_ - moved_cycle_, kv_.bursts, kv_.beats, kv_.queue.size(),
                 int(kv_.arvalid), int(kv_.rvalid), int(kv_.rready), job_.bursts, job_.beats,
                 job_.queue.size(), int(job_.rvalid), int(job_.rready), out_.bursts, out_.beats,
                 out_.open.size() + out_.answered.size(), int(out_.awvalid), int(out_.wvalid),
                 dram_.refresh_lost, dram_.write_lost, kv_.idle);
        text = line;
        return text.c_str();
    }

  private:
    std::unique_ptr<VerilatedContext> context_;
    std::unique_ptr<Vnearkv> top_;
#if VM_TRACE
    std::unique_ptr<VerilatedVcdC> trace_;
#endif
    Memory kv_memory_, job_memory_;
    Dram dram_;
    Reader kv_, job_;
    Writer out_;
    Answers answers_;
    Pauses control_pauses_;
    uint64_t cycle_ = 0, moved_cycle_ = 0, quiet_cycles_ = 0;

    // Whether the driver waits a while; a valid that was offered stays.
    bool hesitates(bool offered) { return !offered && control_pauses_.paused(); }

    void in_time(uint64_t start, const char* what, uint32_t offset, const char* signal) {
        if (cycle_ - start > 10000)
            fail("s_axi_control: %s of 0x%x: no %s for 10000 cycles", what, offset, signal);
    }

    void settle() { top_->eval(); }

    // A clock cycle without memory traffic.
    void edge() {
        top_->ap_clk = 0;
        top_->eval();
        dump();
        top_->ap_clk = 1;
        top_->eval();
        dump();
        ++cycle_;
    }

    void tick() {
        top_->ap_clk = 0;
        top_->eval();
        dump();
        answers_.sample(*top_);
        bool moved = kv_.sample(cycle_);
        moved |= job_.sample(cycle_);
        moved |= out_.sample(cycle_);
        if (moved) moved_cycle_ = cycle_;
        top_->ap_clk = 1;
        top_->eval();
        dump();
        ++cycle_;
        // Few reads come from the job port, and all others wait for what they bring.
        job_.drive(cycle_);
        kv_.drive(cycle_);
        out_.drive(cycle_);
    }

    void dump() {
#if VM_TRACE
        if (trace_) trace_->dump(time_ += 1);
#endif
    }
#if VM_TRACE
    uint64_t time_ = 0;
#endif
};

// Runs `body`; -1, with the message kept, if it throws.
template <typename Body>
int64_t guard(void* card, Body body) {
    auto* self = static_cast<Card*>(card);
    try {
        return body(*self);
    } catch (const std::exception& exception) {
        self->error = exception.what();
        return -1;
    }
}

}  // namespace

// Verilator's own exits must not take the Python process along.
void vl_finish(const char* file, int line, const char*) { fail("$finish at %s:%d", file, line); }
void vl_stop(const char* file, int line, const char*) { fail("assertion at %s:%d", file, line); }
void vl_fatal(const char* file, int line, const char*, const char* message) {
    fail("%s at %s:%d", message, file, line);
}

extern "C" {

void* card_open() {
    try {
        return new Card;
    } catch (const std::exception&) {
        return nullptr;
    }
}

void card_close(void* card) { delete static_cast<Card*>(card); }

const char* card_error(void* card) { return static_cast<Card*>(card)->error.c_str(); }

const char* card_state(void* card) { return static_cast<Card*>(card)->state(); }

void card_configure(void* card, uint64_t read_latency, uint64_t write_latency,
                    uint64_t outstanding, uint64_t seed, double stalls, uint64_t quiet_cycles) {
    static_cast<Card*>(card)->configure(read_latency, write_latency, outstanding, seed, stalls,
                                        quiet_cycles);
}

void card_dram(void* card, uint64_t refresh_interval, uint64_t refresh_cycles, uint64_t row_bytes,
               uint64_t banks, uint64_t activate_cycles, uint64_t row_cycle_cycles,
               uint64_t turnaround_cycles) {
    static_cast<Card*>(card)->dram({refresh_interval, refresh_cycles, row_bytes, banks,
                                    activate_cycles, row_cycle_cycles, turnaround_cycles});
}

void card_trace(void* card, const char* path) { static_cast<Card*>(card)->trace(path); }

void card_memories(void* card, uint8_t* kv, uint64_t kv_base, uint64_t kv_bytes, uint8_t* job,
                   uint64_t job_base, uint64_t job_bytes) {
    static_cast<Card*>(card)->memories(kv, kv_base, kv_bytes, job, job_base, job_bytes);
}

void card_allow(void* card, uint64_t offset, uint64_t bytes) {
    static_cast<Card*>(card)->allow(offset, bytes);
}

void card_fault(void* card, uint64_t begin, uint64_t end) {
    static_cast<Card*>(card)->fault(begin, end);
}

int64_t card_reset(void* card) {
    return guard(card, [](Card& self) { return self.reset(), 0; });
}

int64_t card_write(void* card, uint32_t offset, uint32_t value) {
    return guard(card, [=](Card& self) { return self.write(offset, value), 0; });
}

int64_t card_read(void* card, uint32_t offset) {
    return guard(card, [=](Card& self) { return int64_t(self.read(offset)); });
}

int64_t card_wait(void* card, uint32_t offset, uint32_t mask, uint64_t cycles, uint64_t interval) {
    return guard(card, [=](Card& self) { return self.wait(offset, mask, cycles, interval); });
}

int64_t card_finish(void* card) {
    return guard(card, [](Card& self) { return self.finish(), 0; });
}

}  // extern "C"
