"""`%%gpu` for Jupyter and IPython: runs a cell under a lease. Loaded by `%load_ext corral`.

    %%gpu 2x24GiB --wait 10m
    model = train()

The variables that select GPUs hold for the cell alone, and the lease ends with it, however it ends.
"""

from __future__ import annotations

import contextlib
import html
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from ..schemas.operations import DeviceStatus
from ..schemas.values.globs import containing
from ..schemas.values.units import format_bytes
from . import notebook
from .errors import CorralError, InvalidRequest, Rejected
from .leases.environment import local_host
from .leases.lease import HeldLease
from .request import RequestFields
from .sync import SyncClient

SECONDS: Final = 2.0
"""Time between two updates of the table below a running cell."""
_AMOUNT: Final = re.compile(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?\s*[a-zA-Z]+)|(\d+)(?:x)?")


class CellFailed(Exception):
    """The cell raised an error, which IPython has shown already: this stops `Run all`, and shows nothing more."""

    def _render_traceback_(self) -> list[str]:
        return []


def fields_of(amount: str) -> RequestFields:
    """Fields of a request for `2x24GiB`, `24GiB`, `2`, or nothing, which is one GPU.

    Raises:
        UsageError: it is none of these.
    """
    if not amount:
        return {"gpus": 1}
    found = _AMOUNT.fullmatch(amount.strip())
    if found is None:
        bytes_alone = re.fullmatch(r"(\d+)\s*x\s*(\d+)", amount.strip())
        meant = f": say {bytes_alone[1]}x{bytes_alone[2]}GiB" if bytes_alone else ""
        raise UsageError(f"%%gpu wants an amount such as 2x24GiB, 24GiB or 2, not {amount!r}{meant}")
    number, memory, alone = found.groups()
    if alone is not None:
        return {"gpus": int(alone)}
    return {"gpus": int(number or 1), "memory": memory}


def _words(error: CorralError) -> str:
    """An error in the words of the magic: its options, and what a kernel without GPUs needs."""
    if isinstance(error, InvalidRequest) and error.field == "$.wait_seconds":
        return f"--wait: {error}"
    if isinstance(error, Rejected):
        mine = local_host()
        with contextlib.suppress(CorralError), SyncClient() as client:
            if not client.fleet(hosts=[mine]).devices:
                return (
                    f"this kernel runs on {mine}, which has no devices in the fleet: start it where GPUs are and "
                    "`corral collect` runs, or run the work there (corral submit)"
                )
    return str(error)


@magics_class
class GpuMagics(Magics):
    """The magics `%%gpu` and `%gpu`."""

    @magic_arguments()
    @argument("amount", nargs="?", default="", help="GPUs and memory on each: 2x24GiB, 24GiB, 2. Default: one GPU.")
    @argument("--share", type=float, help="share of one GPU, such as 0.5")
    @argument("--model", help="model, a part of its name such as H100, or a glob")
    @argument("--wait", default="0s", help="wait in the queue for so long, such as 10m")
    @argument("--name", default="notebook", help="name of the workload")
    @argument("--quiet", action="store_true", help="show no table")  # pyright: ignore[reportUntypedFunctionDecorator]
    @cell_magic
    def gpu(self, line: str, cell: str) -> None:
        """Run the cell under a lease on GPUs of this host; it ends with the cell."""
        options = parse_argstring(self.gpu, line)
        fields: RequestFields = {**fields_of(options.amount), "name": options.name, "wait": options.wait}
        if options.share is not None:
            fields["share"] = options.share
            if options.amount and fields.pop("gpus") != 1:
                raise UsageError("--share is of one GPU")
        if options.model:
            fields["models"] = [containing(options.model)]
        shell: Any = self.shell
        with contextlib.ExitStack() as stack:
            try:
                client = stack.enter_context(SyncClient())
                held = stack.enter_context(client.lease(set_environment=True, **fields))
            except CorralError as error:
                raise UsageError(f"%%gpu: {_words(error)}") from error  # which IPython shows in one line
            _warn_of_cuda()
            if not options.quiet:
                stack.enter_context(_table(client, held, live=hasattr(shell, "kernel")))
            result = shell.run_cell(cell, store_history=False)
            if not result.success:
                raise CellFailed(f"the cell failed, and lease {held.lease_id} has ended")

    @line_magic("gpu")  # pyright: ignore[reportUntypedFunctionDecorator]
    def gpus(self, line: str) -> notebook.DeviceList:
        """List the GPUs of the fleet, or those of a host: `%gpu node-7`."""
        with SyncClient() as client:
            found = client.devices(hosts=[line.strip()] if line.strip() else [])
        return notebook.DeviceList(found)


def _warn_of_cuda() -> None:
    """Say it where the variables come too late: CUDA reads them once in a process."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print(
            "%%gpu: CUDA is initialized in this kernel, and keeps the GPUs that it saw then: restart the kernel, or "
            "start a process in the cell",
            file=sys.stderr,
        )


class _Held:
    """Devices that a cell holds, as IPython shows them."""

    def __init__(self, rows: Sequence[Sequence[Any]], note: str) -> None:
        self.rows = rows
        self.note = note

    def __repr__(self) -> str:
        return self.note

    def _repr_html_(self) -> str:
        columns = ["host", "gpu", "model", "utilization", "used", "temperature"]
        return notebook.table(columns, self.rows) + f"<p>{html.escape(self.note)}</p>"


@contextlib.contextmanager
def _table(client: SyncClient, held: HeldLease, *, live: bool) -> Generator[None]:
    """Show the devices of a lease below the cell, and keep them up to date for as long as it runs, where that works."""
    began = time.monotonic()
    what = f"lease {held.lease_id}: {', '.join(f'{g.host}/{g.index}' for g in held.lease.grants if g.device)}"
    handle: Any = display(_Held(_rows(client, held), f"{what}, held while the cell runs"), display_id=True)
    done = threading.Event()

    def update(finish: Callable[[], bool]) -> None:
        while not finish():
            with contextlib.suppress(CorralError):
                handle.update(_Held(_rows(client, held), f"{what}, held for {time.monotonic() - began:.0f} s"))

    thread = threading.Thread(target=update, args=(lambda: done.wait(SECONDS),), daemon=True)
    if live:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if live:
            thread.join(10)
            handle.update(_Held([], f"{what}, held for {time.monotonic() - began:.0f} s"))


def _rows(client: SyncClient, held: HeldLease) -> list[tuple[Any, ...]]:
    wanted = {grant.device for grant in held.lease.grants}
    hosts = sorted({grant.host for grant in held.lease.grants})
    return [_row(device) for device in client.devices(hosts=hosts) if device.uuid in wanted]


def _row(device: DeviceStatus) -> tuple[Any, ...]:
    return (
        device.host,
        device.index,
        notebook.short_model(device.model),
        None if device.utilization_percent is None else f"{device.utilization_percent:.0f} %",
        None if device.memory_used_bytes is None else format_bytes(device.memory_used_bytes),
        None if device.temperature_celsius is None else f"{device.temperature_celsius:.0f} °C",
    )


def load_ipython_extension(ipython: Any) -> None:
    """Register the magics, and the HTML tables of `corral.client`."""
    notebook.load_ipython_extension(ipython)
    ipython.register_magics(GpuMagics)
