"""`corral fit`: whether the free GPUs can serve a model, how to split it over them, and how fast."""

from __future__ import annotations

import typer

from ....client.server_commands.command import FIRST_PORT
from ....schemas.models.serving import FitVerdict
from ... import exits
from ...options import AsJson, NatsUrl, Timeout, console, print_json
from .fit_report import Choose, Listen, Load, Measured, Port, Server, Where, ask, check_server, chosen
from .fit_tables import fit_lines, offer_lines, plan_lines
from .model_options import Asking, with_model_options


@with_model_options
def fit(
    asked: Asking,
    choose: Choose = 1,
    server: Server = None,
    load: Load = None,
    port: Port = FIRST_PORT,
    listen: Listen = "",
    measured: Measured = True,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 30.0,
) -> None:
    """Find out whether the free GPUs can serve a model, how to split it, and how fast (exit code 4 if they can't).

    Reads a Hugging Face config.json, headers of safetensors or GGUF files, or --params and --layers. Nothing is leased.
    Tokens per second are upper bounds: from data sheets, or from rates that --profile has.

    Examples:
      corral fit ./Llama-3.1-70B-Instruct --context 8192 --sequences 16
      corral fit model-Q4_K_M.gguf --server llama.cpp
      corral fit --params 70B --layers 80 --kv-heads 8 --heads 64 --dtype fp8
      corral fit ./config.json --with-more '4xNVIDIA H100 80GB HBM3'
    """
    check_server(server)
    report = ask(asked(), choose, server, Where(load, port, listen), nats, timeout, measured=measured)
    if json:
        print_json(report)
    else:
        out = console()
        for line in fit_lines(report.work, report.fit):
            out.print(line)
        if report.fit.plans:
            out.print(f"[bold]Plan {choose}[/]")
            for line in plan_lines(chosen(report.fit, choose)):
                out.print(line)
            for line in offer_lines(report.offers):
                out.print(line, soft_wrap=True)
    if report.fit.verdict is FitVerdict.NO:
        raise typer.Exit(exits.REJECTED)
