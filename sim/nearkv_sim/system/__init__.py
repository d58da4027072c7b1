# SPDX-License-Identifier: Apache-2.0
"""The system model: what a model, a machine and a policy give, before anything is bought.

describe     models, machines, work, parameters (TOML files in this package)
policy       FlexGen, InstInfer, INF2, HILOS and nearkv as facts
closed_form  loads of every resource in a decode step, and what follows
traffic      exact bytes of the nearkv engine, out of the ABI
optimise     nearkv's shares over the tiers, as a linear programme
events       the same step as a discrete-event simulation
scale        many hosts: how far one workload spreads
measure      a profile of the machine at hand, as a machine file
published    results of the four systems, and how well they are predicted
report       sweeps, CSV, HTML and PNG
"""
