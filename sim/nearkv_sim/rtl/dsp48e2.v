// SPDX-License-Identifier: Apache-2.0
// The DSP48E2 of AMD UltraScale and UltraScale+, as far as nearkv_hw.primitives uses it:
// p = a * b + (0, p, c or pcin >> 17), every register present. For simulation and proofs.
// Ref: AMD UG579. Anything else that is asked of it stops the simulation, or fails the proof.
module DSP48E2 #(
  parameter ACASCREG = 1, ADREG = 1, ALUMODEREG = 1, AREG = 1, BCASCREG = 1, BREG = 1,
  parameter B_INPUT = "DIRECT",
  parameter CARRYINREG = 1, CARRYINSELREG = 1, CREG = 1, DREG = 1, INMODEREG = 1, MREG = 1,
  parameter OPMODEREG = 1, PREG = 1
) (
  input CLK,
  input [29:0] A, ACIN, input [17:0] B, BCIN, input [47:0] C, PCIN, input [26:0] D,
  input [8:0] OPMODE, input [3:0] ALUMODE, input [4:0] INMODE, input [2:0] CARRYINSEL,
  input CARRYIN, CARRYCASCIN, MULTSIGNIN,
  input CEA1, CEA2, CEAD, CEALUMODE, CEB1, CEB2, CEC, CECARRYIN, CECTRL, CED, CEINMODE, CEM, CEP,
  input RSTA, RSTALLCARRYIN, RSTALUMODE, RSTB, RSTC, RSTCTRL, RSTD, RSTINMODE, RSTM, RSTP,
  output [47:0] P, PCOUT, output [17:0] BCOUT
);
  reg [29:0] a1, a2;
  reg [17:0] b1, b2;
  reg signed [44:0] product;
  reg [47:0] c, p, z;
  reg [8:0] opmode;
  wire [17:0] b = B_INPUT == "CASCADE" ? BCIN : B;

  always @* case (opmode[6:4])
    3'b000: z = 0;
    3'b010: z = p;
    3'b011: z = c;
    3'b101: z = {{17{PCIN[47]}}, PCIN[47:17]};
    default: z = 48'bx;
  endcase

  always @(posedge CLK) begin
    if (CEA1) a1 <= A;
    if (CEA2) a2 <= AREG == 2 ? a1 : A;
    if (CEB1) b1 <= b;
    if (CEB2) b2 <= BREG == 2 ? b1 : b;
    if (CEC) c <= C;
    if (CECTRL) opmode <= OPMODE;
    if (CEM) product <= $signed(a2[26:0]) * $signed(b2);
    if (CEP) p <= z + {{3{product[44]}}, product};
  end
  assign P = p;
  assign PCOUT = p;
  assign BCOUT = b2;

  initial
    if (ACASCREG != AREG || BCASCREG != BREG || AREG != BREG || CREG + MREG + PREG + OPMODEREG != 4
        || ADREG + DREG + ALUMODEREG + INMODEREG + CARRYINREG + CARRYINSELREG != 0) begin
      $display("DSP48E2: registers that this model does not have");
      $stop;
    end
  wire known = {OPMODE[8:7], OPMODE[3:0]} == 6'b000101
    && {ALUMODE, INMODE, CARRYINSEL, CARRYIN, CARRYCASCIN, MULTSIGNIN} == 0
    && {RSTA, RSTALLCARRYIN, RSTALUMODE, RSTB, RSTC, RSTCTRL, RSTD, RSTINMODE, RSTM, RSTP} == 0;
`ifdef FORMAL
  always @* assert (known);
`else
  always @(posedge CLK)
    if (!known) begin
      $display("DSP48E2: a mode that this model does not have");
      $stop;
    end
`endif
endmodule
