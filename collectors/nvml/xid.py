"""Xid codes of the NVIDIA driver: the meaning of each, and its severity for the device.

After NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors). Its immediate action gives the severity: restart of
the application is `application`, reset of the GPU `reset`, reboot of the host or work on the board `hardware`, to
ignore `warning` or `info`. Where it names a workflow, the severity is that of the step that restores service; the
NVLink errors 144 to 150 may need nothing or a reset, which drivers that have them report as the recovery action.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from ...schemas.telemetry import Severity

_I, _W, _A, _R, _H = Severity.INFO, Severity.WARNING, Severity.APPLICATION, Severity.RESET, Severity.HARDWARE


class Xid(Struct, frozen=True):
    """A code of the driver.

    Attributes:
        code: the number.
        meaning: in words.
        severity: for the device.
    """

    code: int
    meaning: str
    severity: Severity


_TABLE: Final[tuple[tuple[int, Severity, str], ...]] = (
    (1, _A, "invalid or corrupted push buffer stream"),
    (2, _A, "invalid or corrupted push buffer stream"),
    (3, _A, "invalid or corrupted push buffer stream"),
    (4, _A, "invalid or corrupted push buffer stream, or the GPU semaphore timed out"),
    (5, _W, "unused code of the command fetcher (run-out overflow)"),
    (6, _A, "invalid or corrupted push buffer stream"),
    (7, _A, "invalid or corrupted push buffer address"),
    (8, _A, "the GPU stopped processing: a channel timed out"),
    (9, _A, "the driver programmed the GPU wrongly"),
    (10, _W, "unused code of the graphics engine (single step)"),
    (11, _A, "invalid or corrupted push buffer stream: missing hardware method"),
    (12, _A, "the driver handled a GPU exception"),
    (13, _A, "graphics engine exception: mostly an access out of bounds or an illegal instruction of the program"),
    (14, _W, "an error injected for a test"),
    (15, _W, "display: scan line timed out"),
    (16, _W, "display engine hung"),
    (17, _W, "a parameter of the channel is wrong"),
    (18, _W, "bus mastering is off in PCI configuration space"),
    (19, _W, "display engine error: missed notifier"),
    (20, _A, "invalid or corrupted MPEG push buffer"),
    (21, _A, "invalid or corrupted motion estimation push buffer"),
    (22, _A, "invalid or corrupted video processor push buffer"),
    (23, _I, "error logging was enabled"),
    (24, _A, "GPU semaphore timed out"),
    (25, _A, "invalid or illegal push buffer stream"),
    (26, _W, "frame buffer timed out"),
    (27, _A, "video processor exception"),
    (28, _A, "video processor exception"),
    (29, _A, "video processor exception"),
    (30, _W, "GPU semaphore access error"),
    (31, _A, "GPU memory page fault: mostly an illegal address of the program"),
    (32, _A, "invalid or corrupted push buffer stream, at times a poor PCIe link"),
    (33, _A, "security engine error"),
    (34, _A, "video processor exception"),
    (35, _A, "video processor exception"),
    (36, _A, "video processor exception"),
    (37, _W, "driver firmware error: method not implemented"),
    (38, _W, "driver firmware error: watchdog timed out"),
    (39, _A, "copy engine exception"),
    (40, _A, "copy engine exception"),
    (41, _A, "copy engine exception"),
    (42, _A, "video processor exception"),
    (43, _A, "the GPU stopped processing a program that had a fault; the device is well"),
    (44, _W, "graphics engine fault during a context switch"),
    (45, _A, "a program's channel was removed: it ended, was killed, or an earlier error took it"),
    (46, _R, "the GPU stopped processing: timeout"),
    (47, _A, "video encoder exception"),
    (48, _R, "double bit ECC error: memory is damaged until a reset"),
    (49, _W, "power state was locked by configuration"),
    (50, _W, "power state changed after an error"),
    (51, _W, "power state changed: stress test failed"),
    (52, _W, "power state changed: temperature rose"),
    (53, _W, "power state changed: clocks lowered for temperature"),
    (54, _H, "auxiliary power is not connected to the board"),
    (55, _W, "the temperature can't be read"),
    (56, _W, "display engine error"),
    (57, _H, "video memory interface: link training failed"),
    (58, _H, "video memory interface error: unstable memory"),
    (59, _R, "internal microcontroller error (older drivers)"),
    (60, _A, "video processor exception"),
    (61, _R, "internal microcontroller breakpoint or warning (newer drivers)"),
    (62, _R, "internal microcontroller halted"),
    (63, _W, "memory is being repaired: a row was remapped or a page retired; takes effect at the next reset"),
    (64, _R, "memory could not be repaired: row remapping or page retirement failed"),
    (65, _A, "video encoder exception"),
    (66, _W, "illegal access by the driver"),
    (67, _W, "illegal access by the driver"),
    (68, _A, "video decoder exception (NVDEC0)"),
    (69, _A, "graphics engine class error"),
    (70, _A, "copy engine exception (CE3)"),
    (71, _A, "copy engine exception (CE4)"),
    (72, _A, "copy engine exception (CE5)"),
    (73, _A, "video encoder exception (NVENC2)"),
    (74, _R, "NVLink error: a link to another GPU or switch has a problem"),
    (75, _A, "copy engine exception (CE6)"),
    (76, _A, "copy engine exception (CE7)"),
    (77, _A, "copy engine exception (CE8)"),
    (78, _W, "a vGPU could not be started"),
    (79, _H, "the GPU has fallen off the bus"),
    (80, _A, "corrupted data was sent to the GPU"),
    (81, _W, "VGA subsystem error"),
    (82, _A, "JPEG engine error (NVJPG0)"),
    (83, _A, "video decoder error (NVDEC1)"),
    (84, _A, "video decoder error (NVDEC2)"),
    (85, _A, "copy engine exception (CE9)"),
    (86, _A, "optical flow accelerator exception"),
    (87, _I, "driver telemetry report"),
    (88, _A, "video decoder error (NVDEC3)"),
    (89, _A, "video decoder error (NVDEC4)"),
    (90, _W, "level two cache error"),
    (91, _W, "reserved code"),
    (92, _W, "many single bit ECC errors"),
    (93, _W, "the InfoROM may not be written more often (wear limit)"),
    (94, _A, "contained memory error: the program that met it must restart, others go on"),
    (95, _R, "uncontained memory error: several programs are hit, and the GPU must be reset"),
    (96, _A, "video decoder error (NVDEC5)"),
    (97, _A, "video decoder error (NVDEC6)"),
    (98, _A, "video decoder error (NVDEC7)"),
    *((99 + n, _A, f"JPEG engine error (NVJPG{n + 1})") for n in range(7)),
    (106, _I, "test message of the board's management bus (SMBPBI)"),
    (107, _I, "silent test message of the board's management bus (SMBPBI)"),
    (108, _W, "NVLink: remote translation error"),
    (109, _R, "context switch timed out"),
    (110, _R, "security fault: seldom anything but hardware"),
    (111, _W, "display: bundle error"),
    (112, _W, "display: supervisor error"),
    (113, _W, "display: DisplayPort link training failed"),
    (114, _W, "display: head underflow"),
    (115, _W, "display: core channel registers"),
    (116, _W, "display: window channel registers"),
    (117, _W, "display: cursor channel registers"),
    (118, _W, "display: head registers"),
    (119, _R, "the GPU system processor (GSP) did not answer in time"),
    (120, _R, "error in the GPU system processor (GSP)"),
    (121, _W, "corrected errors on the chip-to-chip link to the CPU: reset when convenient"),
    (122, _W, "the board's flash could not be read"),
    (123, _W, "the board's flash could not be written"),
    (124, _W, "the board's flash could not be erased"),
    (125, _W, "InfoROM file system error"),
    *((126 + n, _A, f"copy engine exception (CE{n + 10})") for n in range(10)),
    (136, _R, "NVLink training failed"),
    (137, _A, "NVLink privilege error: mostly an illegal peer-to-peer access of the program"),
    (138, _A, "deep learning accelerator error"),
    (139, _A, "optical flow accelerator error (OFA1)"),
    (140, _R, "unrecovered ECC error"),
    (141, _W, "CUDA fast path error"),
    (142, _A, "video encoder error (NVENC3)"),
    (143, _R, "the GPU could not be initialized"),
    (144, _W, "NVLink error (SAW)"),
    (145, _W, "NVLink error (RLW)"),
    (146, _W, "NVLink error (TLW)"),
    (147, _W, "NVLink error (TREX)"),
    (148, _W, "NVLink error (NVLPW control)"),
    (149, _W, "NVLink error (NETIR)"),
    (150, _W, "NVLink error (MSE)"),
    (151, _H, "key rotation error: the virtual machine must restart"),
    (152, _W, "deep learning accelerator: memory management error"),
    (153, _W, "deep learning accelerator: timeout"),
    (154, _W, "the driver asks for another recovery action than before (see the event `recovery_action`)"),
    (155, _R, "NVLink went down by software"),
    (156, _R, "a resource was retired; takes effect at the next reset"),
    (157, _W, "a resource could not be retired: none is left to stand in"),
    (158, _R, "fatal timeout"),
    (159, _W, "error on the coherent link to the CPU (CHI)"),
    (160, _W, "a memory channel was retired"),
    (161, _W, "a memory channel could not be retired"),
    (162, _I, "power smoothing works again"),
    (163, _W, "power smoothing is off"),
    (164, _W, "power smoothing circuitry is near the end of its life"),
    (165, _W, "power smoothing circuitry is at the end of its life"),
    (166, _W, "NVLink: traffic before encryption was set up"),
    (167, _H, "fatal PCIe timeout"),
    (168, _W, "less device memory: errors in a protected region"),
    (169, _R, "internal microcontroller (SEC2) halted"),
    (170, _W, "NVLink: interrupt in confidential computing mode"),
    (171, _R, "uncorrectable error in device memory (with Xid 48)"),
    (172, _R, "uncorrectable error in on-chip memory (with Xid 48)"),
)

XIDS: Final[dict[int, Xid]] = {code: Xid(code, meaning, severity) for code, severity, meaning in _TABLE}
"""Xids by code."""


def describe(code: int) -> Xid:
    """Meaning and severity of a code; one that NVIDIA does not document is a warning, since its severity is unknown."""
    return XIDS.get(code) or Xid(code, "not documented", Severity.WARNING)
