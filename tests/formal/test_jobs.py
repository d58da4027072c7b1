# SPDX-License-Identifier: Apache-2.0
"""Every job that was read gives exactly one partial, whatever stands in job memory."""

from amaranth import Elaboratable, Module, Mux
from amaranth.lib import wiring

from nearkv_hw.abi import MAX_TILES
from nearkv_hw.axi import Span
from nearkv_hw.fifo import Queue
from nearkv_hw.jobs import Q_BANKS, JobInfo, JobReader
from nearkv_hw.merge import PartialWriter

READING = ("Read Page Entry", "Check Page", "Emit Tile")
CHECKING = ("Count Tiles", "Check Job")
BEFORE_TILES = (*CHECKING, "Ask Query", "Ask Pages", "Ask Next Job", "Read Query")
LEGAL = ("Ask Query", "Ask Pages", "Read Query", *READING)
IN_JOB = (*BEFORE_TILES, *READING, "Report")


def assume_runs(b, start, done, args):
    """What `Control` keeps (see test_axi.py): no start in a run, and arguments that stay."""
    running = b.ghost(1, "running")
    b.m.d.sync += running.eq((running | start) & ~done)
    b.assume(~running, when=start)
    same = args.as_value() == b.before(args)
    b.assume(same | start, when=running | start)
    b.assume(same, when=running)
    return running


def test_reader_gives_each_legal_job_one_row_of_tiles_by_induction(bench):
    """Tiles of a job come between the reports of the job before and of its own: none of an illegal
    job; of a legal one, the first and only the first with `job_first`, one with `job_last`, at the
    end. What is read from memory is what was asked for, to the beat, and finds room. The q store
    has a free bank for each job begun."""
    b, m = bench, bench.m
    dut = b.add(JobReader(2, 64))
    reader = dut.state
    b.claim_stream(dut.o_tile, dut.o_job, dut.ar, dut.inside("master").spans)
    tiles, reports = dut.o_tile.valid & dut.o_tile.ready, dut.o_job.valid & dut.o_job.ready
    running = b.ghost(1, "running")
    m.d.sync += running.eq((running | dut.start) & ~reader("Idle"))
    b.assume(reader("Idle"), when=dut.start)
    same = dut.args.as_value() == b.before(dut.args)
    b.assume(same | reader("Idle"))

    opened, ended = b.ghost(1, "opened"), b.ghost(1, "ended")
    with m.If(tiles):
        m.d.sync += [opened.eq(~dut.o_tile.p.job_last), ended.eq(dut.o_tile.p.job_last)]
    with m.Elif(reports):
        m.d.sync += ended.eq(0)
    b.claim(dut.o_tile.p.job_first == ~opened, when=dut.o_tile.valid)
    b.claim(~ended, when=dut.o_tile.valid)
    b.claim(~opened & (dut.o_job.p.legal == ended), when=dut.o_job.valid)
    b.claim(dut.o_tile.p.tokens <= 128)
    b.cover(reports & dut.o_job.p.faults.illegal & (dut.n_jobs == 1))

    tile, info = dut.inside("tile"), dut.inside("info")
    before_tiles, in_tiles = reader(*BEFORE_TILES), reader(*READING)
    b.claim(dut.states())
    b.claim(~opened, when=~in_tiles)
    b.claim(~ended, when=~reader("Report"))
    b.claim(opened == ~tile.job_first, when=in_tiles)
    b.claim(tile.job_first, when=before_tiles)
    b.claim(info.legal, when=reader(*LEGAL))
    b.claim(~info.legal, when=reader(*CHECKING))
    b.claim(info.legal == ended, when=reader("Report"))

    # Beats: asked for, less those used.
    head_dim, channel = dut.inside("head_dim"), dut.inside("channel")
    left, second, jobs = dut.inside("pages_left"), dut.inside("second"), dut.inside("jobs_left")
    pages_due = Mux(left == 0, 0, (left + second + 1)[1:])
    query_due = Mux(reader("Ask Pages") | (reader("Ask Next Job") & info.legal), head_dim,
                    Mux(reader("Read Query"), head_dim - channel, 0))  # fmt: skip
    table_asked = in_tiles | reader("Read Query") | (reader("Ask Next Job") & info.legal)
    job_asked = reader("Read Job") | ((in_tiles | reader("Read Query", "Report")) & (jobs != 0))
    due = query_due + Mux(table_asked, pages_due, 0) + job_asked
    b.claim(channel < head_dim, when=reader("Read Query"))
    b.claim(dut.inside("last_channel") == (head_dim - 1)[:9],
            when=before_tiles & ~reader("Count Tiles"))  # fmt: skip
    b.claim(dut.inside("none_left") == (jobs == 0), when=~reader("Idle"))
    b.claim((head_dim != 0) & (head_dim <= 64), when=info.legal & before_tiles)
    b.claim((channel == 0) & ~second, when=before_tiles & ~reader("Read Query"))
    b.claim(~second, when=reader("Read Query"))
    b.claim((left != 0) & (left <= MAX_TILES), when=info.legal & before_tiles)
    b.claim((left != 0) & (left <= MAX_TILES), when=reader("Read Page Entry"))
    b.claim(left <= MAX_TILES, when=in_tiles)
    issued = dut.ar.valid & dut.ar.ready
    burst_beats = dut.ar.p.beats_less_1 + 1
    on_the_way = b.counter(Mux(issued, burst_beats, 0), dut.r.valid, name="on_the_way")
    b.assume(on_the_way != 0, when=dut.r.valid)
    beats = dut.inside("beats")
    b.claim(beats.i.ready, when=beats.i.valid)
    b.claim_queue(dut, "beats")
    spans, waiting_beats, waiting_spans = dut.inside("spans"), 0, 0
    for span, there in b.entries(dut, "spans", Span):
        waiting_beats += Mux(there, span.beats, 0)
        waiting_spans += there
        b.claim((span.beats != 0) & (span.beats <= MAX_TILES), when=there)
    b.claim(waiting_spans == spans.level)
    b.claim(spans.i.ready, when=spans.i.valid)
    master = dut.inside("master.left"), dut.inside("master.beats"), dut.inside("master.reserved")
    idle, issuing = dut.state("master.Take Span"), dut.state("master.Issue Burst")
    b.claim(due == waiting_beats + Mux(idle, 0, master[0]) + on_the_way + beats.level)
    b.claim(master[2] == on_the_way + beats.level + Mux(issuing, master[1], 0))
    b.claim(master[2] <= beats.depth)
    b.claim(master[1] <= dut.inside("master.room"),
            when=dut.inside("master.fits") & dut.state("master.Reserve"))  # fmt: skip
    b.claim((master[0] != 0) | idle)
    b.claim((master[1] != 0) & (master[1] <= master[0]) & (master[1] <= 64),
            when=dut.state("master.Reserve", "master.Issue Burst"))  # fmt: skip
    b.claim(dut.states("master"))

    # Banks of the q store: of the job being read, and of those whose tiles are all on their way.
    waiting = b.counter(tiles & dut.o_tile.p.job_last, dut.q_free, bits=4, name="waiting")
    b.assume(waiting != 0, when=dut.q_free)
    taken = reader("Ask Pages", "Read Query", *READING) | (reader("Ask Next Job") & info.legal)
    b.claim(dut.inside("q_used") == waiting + taken + dut.inside("q_freed"))
    b.claim(dut.inside("q_used") <= Q_BANKS)
    b.prove(depth=2, reach=16)


class Queueing(Elaboratable):
    """Reader and writer as `Kernel` connects them; what is between them is left to the proof."""

    def __init__(self):
        self.reader, self.writer = JobReader(2, 64), PartialWriter(2, 0)
        self.infos = Queue(JobInfo, 8)

    def elaborate(self, platform):
        m = Module()
        m.submodules.reader, m.submodules.writer = reader, writer = self.reader, self.writer
        m.submodules.infos = infos = self.infos
        wiring.connect(m, reader.o_job, infos.i)
        wiring.connect(m, infos.o, writer.i_job)
        m.d.comb += [
            writer.start.eq(reader.start),
            writer.args.eq(reader.args),
            writer.finished.eq(reader.finished & ~reader.start),
            writer.n_jobs.eq(reader.n_jobs),
            writer.queue_error.eq(reader.error),
        ]
        return m


def test_every_job_read_is_answered_before_done_by_induction(bench):
    """At `done`, as many headers were written as jobs were read, in their order; reader, writer and
    the queue between them have come to rest. So each accepted job has exactly one partial.

    At most 10 jobs have all their tiles on the way and no header yet: the fetch's queues of faults,
    of one entry a job, have room for 16."""
    b, m = bench, bench.m
    dut = b.add(Queueing())
    reader, writer, infos = dut.reader, dut.writer, dut.infos
    for name, part in (("reader", reader), ("writer", writer)):
        b.free_inputs(part, name)
    running = assume_runs(b, reader.start, writer.done, reader.args)

    in_job = dut.state(*(f"reader.{name}" for name in IN_JOB))
    reader_rests, writer_rests = dut.state("reader.Idle"), dut.state("writer.Idle")
    written = dut.inside("writer.written")
    headers = b.ghost(32, "headers")
    m.d.sync += headers.eq(Mux(reader.start, 0, headers + (infos.o.valid & infos.o.ready)))
    b.claim(infos.o.payload.tag == b.before(infos.o.payload.tag),
            when=b.before(infos.o.valid & ~infos.o.ready))  # fmt: skip
    b.claim((headers == reader.n_jobs) & reader_rests & (infos.level == 0), when=writer.done)
    b.cover(writer.done & (headers == 1))

    b.claim(written == headers)
    tile, report = reader.o_tile, reader.o_job
    last_tile = tile.valid & tile.ready & tile.p.job_last
    legal_header = infos.o.valid & infos.o.ready & infos.o.p.legal
    unanswered = b.counter(last_tile, legal_header, name="unanswered")
    b.claim(unanswered <= 10)
    reporting = dut.state("reader.Report") & report.p.legal
    queued = sum((there & info.legal for info, there in b.entries(dut, "infos", JobInfo)), start=0)
    b.claim(unanswered == queued + reporting)
    info = dut.inside("reader.info")
    b.claim(info.legal, when=dut.state(*(f"reader.{name}" for name in LEGAL)))
    b.claim((headers + infos.level + in_job)[:32] == reader.n_jobs)
    b.claim(writer_rests & reader_rests & (infos.level == 0), when=~running)
    b.claim(~writer_rests, when=running)
    b.claim(reader_rests, when=reader.finished)
    b.claim(reader.finished, when=reader_rests & running)
    ending = dut.state(*(f"writer.{name}" for name in
                         ("Drain", "Ask Summary", "Write Summary", "Finish")))  # fmt: skip
    b.claim(reader_rests & (infos.level == 0), when=ending)
    b.claim(infos.o.valid, when=dut.state("writer.Ask Elements", "writer.Write Elements",
                                          "writer.Ask Header", "writer.Write Header"))  # fmt: skip
    b.claim(dut.states("reader") & dut.states("writer"))
    b.prove(depth=2, reach=24)


def test_writer_sends_what_its_spans_announce_by_induction(bench):
    """Stream rules of both outputs; each span is followed by exactly its beats; of each legal job
    `(32 parts + 2) * pairs / 2` beats of elements and one of the header, behind them; of an illegal
    one the header; at the end the summary."""
    b, m = bench, bench.m
    dut = b.add(PartialWriter(2, 0))
    running = assume_runs(b, dut.start, dut.done, dut.args)
    b.assume_stream(dut.i_job, dut.i_faults_k, dut.i_faults_v, dut.i_end, dut.i)
    job = dut.i_job.p
    b.assume((job.pairs == 1) & (job.parts != 0) & (job.parts <= 8), when=dut.i_job.valid)
    b.claim_stream(dut.spans, dut.o)
    asks, sends = dut.spans.valid & dut.spans.ready, dut.o.valid & dut.o.ready
    due = b.counter(Mux(asks, dut.spans.p.beats, 0), sends, name="due")
    b.claim(due == 0, when=dut.spans.valid)
    b.claim(due != 0, when=dut.o.valid)

    elements = b.ghost(16, "elements")  # beats of them, of this job
    with m.If(dut.i_job.valid & dut.i_job.ready):
        m.d.sync += elements.eq(0)
    with m.Elif(sends & dut.state("Write Elements")):
        m.d.sync += elements.eq(elements + 1)
    answered = dut.i_job.valid & dut.i_job.ready
    whole = Mux(job.legal, 16 * job.parts + 1, 0)
    b.claim(elements == whole, when=answered)
    b.claim(sends, when=answered)
    for stream in (dut.i_faults_k, dut.i_faults_v, dut.i_end):
        b.claim(stream.ready == (answered & job.legal))
        b.claim(stream.valid, when=stream.ready)
    b.cover(answered & ~job.legal & (b.counter(answered, name="answers") == 1))

    half, left = dut.inside("half"), dut.inside("beats_left")
    state = dut.state
    b.claim(dut.states())
    b.claim(running == ~state("Idle"))
    b.claim(left + elements == whole, when=state("Write Elements"))
    b.claim((left != 0) & job.legal & (due == left), when=state("Write Elements"))
    b.claim(elements == whole, when=state("Ask Header", "Write Header"))
    b.claim(elements == 0, when=~state("Write Elements", "Ask Header", "Write Header"))
    b.claim(job.legal, when=state("Ask Elements"))
    for name, beats in (("Elements", whole), ("Header", 1), ("Summary", 2)):
        b.claim(dut.inside("span").beats == beats, when=state(f"Ask {name}"))
    b.claim(dut.i_job.valid, when=state("Ask Elements", "Write Elements", "Ask Header",
                                        "Write Header"))  # fmt: skip
    known = dut.i_end.valid & dut.i_faults_k.valid & dut.i_faults_v.valid
    b.claim(known | ~job.legal, when=state("Write Header"))
    b.claim(due == 1, when=state("Write Header"))
    b.claim(due == 2 - half, when=state("Write Summary"))
    b.claim(~half, when=~state("Write Elements", "Write Summary"))
    b.claim(due == 0, when=~state("Write Elements", "Write Header", "Write Summary"))
    b.prove(depth=2, reach=12)
