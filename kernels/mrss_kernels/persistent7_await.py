# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment"
"""How programs of `persistent7_kernel` wait for each other's numbers.

A number that is not there yet has all bits 1: a NaN that no instruction makes. Whoever needs it
reads it until it is something else, so that a number is one store and one load away from the
program that wants it. The loop is in PTX, and each warp's own: one of Gluon's would need a vote of
all warps for every read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mrss_kernels.persistent7_parts import bits_at

_MAX_POLLS = 1 << 22
"""Reads of a number that is not there, some seconds, after which the kernel traps."""


@gluon.constexpr_function
def _loop(num_words, width, firsts, positive, given, sampled):
    """Return PTX that reads words until they are there, and what has come not again.

    Operands: the words, their addresses and, if given, what is known of them. Groups of `width` are
    one behind the other in memory; those that begin with one of `firsts` are read, others are 0. If
    sampled, all but the first group wait until that is there.
    """

    def load(first):
        vector = "" if width == 1 else f".v{width}"
        words = ", ".join(f"${first + i}" for i in range(width))
        return f"ld.volatile.global{vector}.b32 {{{words}}}, [${num_words + first}];"

    merge = "or.b32" if positive else "max.u32"
    bad = "ne.u32 {}, {}, 0" if positive else "eq.u32 {}, {}, 0xffffffff"
    lines = [
        ".reg .pred not_yet, lacks, first_lacks;",
        f".reg .b32 seen, polls, group<{num_words}>;",
    ]
    for i in range(num_words):
        if given:
            lines.append(f"mov.b32 ${i}, ${2 * num_words + i};")
        elif i - i % width not in firsts:
            lines.append(f"mov.b32 ${i}, 0;")
    if not given:
        lines += [load(first) for first in firsts]
    lines += ["mov.b32 polls, 0;", "AGAIN:", "mov.b32 seen, 0;"]
    for first in firsts:
        lines.append(f"mov.b32 group{first}, ${first};")
        lines += [f"{merge} group{first}, group{first}, ${first + i};" for i in range(1, width)]
        if positive:
            # The signs of two halves.
            lines.append(f"and.b32 group{first}, group{first}, 0x80008000;")
        lines.append(f"{merge} seen, seen, group{first};")
    # A warp leaves together: if its threads could part, ptxas would serialise `wgmma` behind them.
    lines.append(f"setp.{bad.format('lacks', 'seen')};")
    lines.append("vote.sync.any.pred lacks, lacks, 0xffffffff;")
    lines += ["@!lacks bra.uni THERE;", "add.u32 polls, polls, 1;"]
    lines += [f"setp.ge.u32 lacks, polls, {_MAX_POLLS};", "@lacks trap;"]
    for first in firsts:
        lines.append(f"setp.{bad.format('not_yet', f'group{first}')};")
        if sampled and first == firsts[0]:
            lines.append("mov.pred first_lacks, not_yet;")
        elif sampled:
            lines.append("@first_lacks setp.ne.u32 not_yet, 0, 0;")
        lines.append(f"@not_yet {load(first)}")
    return "\n".join(["{", *lines, "bra.uni AGAIN;", "THERE:", "}"])


@gluon.constexpr_function
def _constraints(num_words, given):
    return ",".join(["=&r"] * num_words + ["l"] * num_words + ["r"] * num_words * given)


@gluon.constexpr_function
def _firsts(num_tensors, pack, width, live):
    """Return the first words of the groups that are read: of each tensor's, the first `live`."""
    groups = range(min(live, pack // width))
    return [tensor * pack + group * width for tensor in range(num_tensors) for group in groups]


@gluon.jit
def await_words(
    ps,
    WIDTH: gl.constexpr,
    LIVE: gl.constexpr = 1 << 20,
    POSITIVE: gl.constexpr = False,
    SAMPLED: gl.constexpr = False,
    given=None,
):
    """Return the words int32 that a tuple of pointers, tensors of one shape, point to, once there.

    A word is a number in fp32, or two of 16 bits: written at once or, if POSITIVE, apart and with
    sign bits that are never set. Each of 128 threads waits for its own; only a barrier says that
    the others' are there too.

    WIDTH neighbours in a thread's registers are read at once, 4 WIDTH bytes. Of such groups the
    first LIVE of each tensor are read, the others' words are 0. If SAMPLED, the first one is looked
    for alone until it is there: less is read, and the others one read later. Of `given` words those
    that are not there, as -1 is, are read again; others stay.
    """
    PACK: gl.constexpr = ps[0].numel // 128
    NUM_WORDS: gl.constexpr = len(ps) * PACK
    GIVEN: gl.constexpr = given is not None
    FIRSTS: gl.constexpr = _firsts(len(ps), PACK, WIDTH, LIVE)
    LOOP: gl.constexpr = _loop(NUM_WORDS, WIDTH, FIRSTS, POSITIVE, GIVEN, SAMPLED)
    operands = ()
    for i in gl.static_range(len(ps)):
        operands = operands + (ps[i].to(gl.int64, bitcast=True),)  # noqa: RUF005 (no * in Gluon)
    if GIVEN:
        operands = operands + given
    return gl.inline_asm_elementwise(
        LOOP,
        _constraints(NUM_WORDS, GIVEN),
        operands,
        dtype=(gl.int32,) * len(ps),
        is_pure=False,
        pack=PACK,
    )


@gluon.jit
def await_word(p):
    """Wait until the number in fp32, or the pair of 16 bits, that p points to is there."""
    gl.inline_asm_elementwise(
        _loop(1, 1, [0], False, False, False),
        _constraints(1, False),
        [bits_at(p).to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
