// SPDX-License-Identifier: Apache-2.0
// A kernel that computes nothing and breaks one rule of its interfaces on request: the tag of the first
// job says which (see test_harness.py). It reads job i, reads 64 beats at kv + 4096 i, and writes one
// beat, their exclusive or, to the job's partial; then two beats to the summary.

module nearkv (
    input ap_clk, input ap_rst_n,
    input s_axi_control_awvalid, output s_axi_control_awready, input [11:0] s_axi_control_awaddr,
    input s_axi_control_wvalid, output s_axi_control_wready,
    input [31:0] s_axi_control_wdata, input [3:0] s_axi_control_wstrb,
    output s_axi_control_bvalid, input s_axi_control_bready, output [1:0] s_axi_control_bresp,
    input s_axi_control_arvalid, output s_axi_control_arready, input [11:0] s_axi_control_araddr,
    output s_axi_control_rvalid, input s_axi_control_rready,
    output reg [31:0] s_axi_control_rdata, output [1:0] s_axi_control_rresp,
    output m_axi_kv_arid, output m_axi_kv_arvalid, input m_axi_kv_arready,
    output [63:0] m_axi_kv_araddr, output [7:0] m_axi_kv_arlen, output [2:0] m_axi_kv_arsize,
    output [1:0] m_axi_kv_arburst,
    input m_axi_kv_rid, input m_axi_kv_rvalid, output m_axi_kv_rready, input [511:0] m_axi_kv_rdata,
    input [1:0] m_axi_kv_rresp, input m_axi_kv_rlast,
    output m_axi_job_arid, output m_axi_job_arvalid, input m_axi_job_arready,
    output [63:0] m_axi_job_araddr, output [7:0] m_axi_job_arlen, output [2:0] m_axi_job_arsize,
    output [1:0] m_axi_job_arburst,
    input m_axi_job_rid, input m_axi_job_rvalid, output m_axi_job_rready,
    input [511:0] m_axi_job_rdata, input [1:0] m_axi_job_rresp, input m_axi_job_rlast,
    output m_axi_job_awid, output m_axi_job_awvalid, input m_axi_job_awready,
    output [63:0] m_axi_job_awaddr, output [7:0] m_axi_job_awlen, output [2:0] m_axi_job_awsize,
    output [1:0] m_axi_job_awburst,
    output m_axi_job_wvalid, input m_axi_job_wready, output [511:0] m_axi_job_wdata,
    output [63:0] m_axi_job_wstrb, output m_axi_job_wlast,
    input m_axi_job_bid, input m_axi_job_bvalid, output m_axi_job_bready,
    input [1:0] m_axi_job_bresp, output interrupt
);
    localparam IDLE = 0, JOB_AR = 1, JOB_R = 2, KV_AR = 3, KV_R = 4, AW = 5, W = 6, B = 7, DONE = 8;
    reg [31:0] words[0:31];
    reg bvalid, rvalid, start, done, beat, in_summary;
    reg [3:0] state;
    reg [7:0] job, fault, phase;
    reg [31:0] partial;
    reg [511:0] sum;
    wire [63:0] kv = {words[5], words[4]}, base = {words[8], words[7]};

    assign {m_axi_job_arid, m_axi_job_awid} = 0;
    assign m_axi_kv_arid = fault == 17;
    assign {s_axi_control_bresp, s_axi_control_rresp} = 0;
    assign s_axi_control_awready = s_axi_control_awvalid & s_axi_control_wvalid & ~bvalid;
    assign s_axi_control_wready = s_axi_control_awready;
    assign s_axi_control_arready = ~rvalid;

    // No valid in reset, from its first cycle.
    assign s_axi_control_bvalid = bvalid & ap_rst_n;
    assign s_axi_control_rvalid = rvalid & ap_rst_n;
    assign interrupt = 0;
    assign m_axi_job_arvalid = ap_rst_n ? state == JOB_AR : fault == 13;
    assign m_axi_job_araddr = base + words[10] + 64 * job;
    assign {m_axi_job_arlen, m_axi_job_arsize, m_axi_job_arburst} = {8'd0, 3'd6, 2'd1};
    assign m_axi_job_rready = state == JOB_R;

    assign m_axi_kv_arvalid = ap_rst_n && state == KV_AR && !(fault == 8 && phase[1]);
    assign m_axi_kv_araddr = kv + 4096 * job + (fault == 1 ? 64 : fault == 4 ? 32 : 0)
        + (fault == 7 ? {phase, 12'd0} : 0);
    assign m_axi_kv_arlen = 63;
    assign m_axi_kv_arsize = fault == 2 ? 5 : 6;
    assign m_axi_kv_arburst = fault == 3 ? 2 : 1;
    assign m_axi_kv_rready = state == KV_R;

    assign m_axi_job_awvalid = ap_rst_n && state == AW;
    assign m_axi_job_awaddr = base + (in_summary ? words[14] : partial + (fault == 5 ? 1 << 14 :
        fault == 12 ? 1 << 24 : 0));
    assign m_axi_job_awlen = in_summary;
    assign {m_axi_job_awsize, m_axi_job_awburst} = {3'd6, 2'd1};
    assign m_axi_job_wvalid = ap_rst_n && state == W;
    assign m_axi_job_wdata = in_summary ? {504'd0, 7'd1, beat} : sum;
    assign m_axi_job_wstrb = ~(fault == 14 ? 64'd8 : 64'd0);
    assign m_axi_job_wlast = fault == 6 ? !beat : beat == in_summary;
    assign m_axi_job_bready = state == B || state == DONE;

    always @(posedge ap_clk)
        if (!ap_rst_n) begin
            {bvalid, rvalid, start, done} <= 0;
            {state, fault, phase} <= 0;
        end else begin
            phase <= phase + 1;
            if (s_axi_control_bready) bvalid <= 0;
            if (s_axi_control_awready) begin
                bvalid <= 1;
                if (s_axi_control_awaddr == 0) start <= s_axi_control_wdata[0];
                else words[s_axi_control_awaddr[6:2]] <= s_axi_control_wdata;
            end
            if (s_axi_control_rready) rvalid <= fault == 18;
            if (rvalid && fault == 15) s_axi_control_rdata[31:24] <= phase;
            if (s_axi_control_arvalid && s_axi_control_arready) begin
                rvalid <= 1;
                case (s_axi_control_araddr)
                    12'h00: begin
                        s_axi_control_rdata <= {done, !start, done, start};
                        done <= 0;
                    end
                    12'h40: s_axi_control_rdata <= `ABI_VERSION;
                    12'h44: s_axi_control_rdata <= `CONFIG_HASH;
                    default: s_axi_control_rdata <= 0;
                endcase
            end
            case (state)
                IDLE: if (start) begin
                    job <= 0;
                    in_summary <= 0;
                    state <= JOB_AR;
                end
                JOB_AR: if (m_axi_job_arready) state <= JOB_R;
                JOB_R: if (m_axi_job_rvalid) begin
                    partial <= m_axi_job_rdata[127:96];
                    fault <= m_axi_job_rdata[263:256];
                    sum <= 0;
                    state <= KV_AR;
                end
                KV_AR: if (m_axi_kv_arvalid && m_axi_kv_arready) begin
                    if (fault != 16) state <= KV_R;  // 16: asks again and again
                    if (fault == 11) begin  // done with a read under way
                        {start, done} <= 1;
                        state <= IDLE;
                    end
                end
                KV_R: if (m_axi_kv_rvalid) begin
                    sum <= sum ^ m_axi_kv_rdata;
                    beat <= 0;
                    if (m_axi_kv_rlast) state <= AW;
                end
                AW: if (m_axi_job_awready) state <= W;
                W: if (m_axi_job_wready) begin
                    beat <= 1;
                    if (beat == in_summary) state <= B;
                    if (fault == 9 && in_summary && beat) begin  // done without the response
                        {start, done} <= 1;
                        state <= DONE;
                    end
                end
                B: if (m_axi_job_bvalid) begin
                    beat <= 0;
                    if (in_summary) begin
                        if (fault != 10) {start, done} <= 1;  // 10: never done
                        state <= fault == 10 ? DONE : IDLE;
                    end else begin
                        job <= job + 1;
                        in_summary <= job + 1 == words[12];
                        state <= job + 1 == words[12] ? AW : JOB_AR;
                    end
                end
                default: ;
            endcase
        end
endmodule
