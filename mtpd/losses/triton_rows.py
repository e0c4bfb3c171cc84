"""The two kernels, and their functions. What they are for is in `fused_kernels.py`.

Names in capitals are constants of a kernel. KL, REVERSE, JENSEN and TOTAL say which divergences it computes: one of
them, KL and TOTAL for a mixture of both, or none, and then COMPARED is false.

Legend: one program has one row; `there` marks the columns that exist, `inside` those that are compared.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)
"""Lower than all logits, and finite: no difference of two of them is NaN."""


@triton.jit
def finished(product, scale, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`Unembedding.finish` in float32. tanh x = 1 - 2 / (exp 2x + 1)."""
    y = product.to(tl.float32) * scale
    if CAPPED:
        y = (1.0 - 2.0 / (tl.exp(2.0 * (y / softcap)) + 1.0)) * softcap
    return y


@triton.jit
def teacher_logits(  # type: ignore[no-untyped-def]
    row,
    columns,
    at,
    there,
    threshold,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    DRAFT: tl.constexpr,
    TOP_N: tl.constexpr,
):
    """Teacher logits over the temperature, and which of them are compared."""
    place = at
    if DRAFT:
        place = tl.load(columns + at, mask=there, other=0)
    product = tl.load(row + place, mask=there, other=0.0).to(tl.float32)
    z = finished(product, scale, softcap, CAPPED)
    if TOP_N:
        inside = product >= threshold
        if CAPPED:
            # Different products may have one and the same logit, near the cap: ties stay in.
            inside = inside | (z >= finished(threshold, scale, softcap, CAPPED))
        there = there & inside
    return z / temperature, there


@triton.jit
def walked(best, total, chosen, values, inside, start, SUMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum, sum of exponentials and arg-max of a row, after one more block of its columns.

    Returns:
        These three, the exponentials of the block, and what sums of those before it are to be multiplied with: both are
        relative to the new maximum.
    """
    seen = tl.where(inside, values, LOWEST)
    largest, place = tl.max(seen, 0, return_indices=True)
    chosen = tl.where(largest > best, start + place, chosen)
    above = tl.maximum(best, largest)
    exponentials, shrunk = seen, above
    if SUMS:
        exponentials = tl.where(inside, tl.exp(seen - above), 0.0)
        shrunk = tl.exp(best - above)
        total = total * shrunk + tl.sum(exponentials, 0)
    return above, total, chosen, exponentials, shrunk


@triton.jit
def nth_largest(row, width, top_n, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The n-th largest product of a row, in float32."""
    LEAST: tl.constexpr = -(2 ** (BITS - 1))
    found = tl.full((), LEAST, tl.int32)
    for step in range(BITS):
        # From the sign on: adding the highest power to the least number is 0.
        candidate = tl.full((), 0, tl.int32)
        if step > 0:
            candidate = found + (1 << (BITS - 1 - step))
        count = tl.full((), 0, tl.int32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < width
            bits = bits_of(tl.load(row + at, mask=there, other=0.0), BITS)
            count += tl.sum(((ordered(bits, BITS) >= candidate) & there).to(tl.int32), 0)
        found = tl.where(count >= top_n, candidate, found)
    bits = ordered(found, BITS)
    if BITS == 16:
        largest = bits.to(tl.int16).to(row.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        largest = bits.to(tl.float32, bitcast=True)
    return largest


@triton.jit
def bits_of(product, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of a floating-point number as a signed integer."""
    if BITS == 16:  # noqa: SIM108
        bits = product.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = product.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def ordered(bits, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of the floating-point numbers whose bits they are; and back, for it is its own inverse."""
    ALL: tl.constexpr = 2 ** (BITS - 1) - 1
    return tl.where(bits < 0, bits ^ ALL, bits)


@triton.jit
def teacher_rows(  # type: ignore[no-untyped-def]
    products,
    columns,
    numbers,
    choice,
    tokens,
    width,
    top_n,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    DRAFT: tl.constexpr,
    TOP_N: tl.constexpr,
    COMPARED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exp, Σ q log q, true probability of the columns, threshold of the top n, and choice of one row."""
    program, rows = tl.program_id(0), tl.num_programs(0)
    row = products + program.to(tl.int64) * tokens
    threshold = tl.full((), LOWEST, tl.float32)
    if TOP_N:
        threshold = nth_largest(row, width, top_n, BITS, BLOCK)
    best = tl.full((), LOWEST, tl.float32)
    chosen = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, inside = teacher_logits(
            row, columns, at, at < width, threshold, scale, softcap, temperature, CAPPED, DRAFT, TOP_N
        )
        best, total, chosen, q, shrunk = walked(best, total, chosen, z, inside, start, COMPARED)
        if COMPARED:
            weighted = weighted * shrunk + tl.sum(q * z, 0)
    tl.store(choice + program, chosen.to(tl.int64))
    if COMPARED:
        lse = best + tl.log(total)
        mass = tl.full((), 1.0, tl.float32)
        if DRAFT:
            top = tl.full((), LOWEST, tl.float32)
            everything = tl.full((), 0.0, tl.float32)
            for start in range(0, tokens, BLOCK):
                at = start + tl.arange(0, BLOCK)
                z = finished(tl.load(row + at, mask=at < tokens, other=0.0), scale, softcap, CAPPED) / temperature
                top, everything, _, _, _ = walked(top, everything, chosen, z, at < tokens, start, True)
            mass = tl.exp(lse - top - tl.log(everything))
        tl.store(numbers + program, lse)
        tl.store(numbers + rows + program, weighted / total - lse)
        tl.store(numbers + 2 * rows + program, mass)
        tl.store(numbers + 3 * rows + program, threshold)


@triton.jit
def student_rows(  # type: ignore[no-untyped-def]
    products,
    teachers,
    lses,
    entropies,
    masses,
    thresholds,
    columns,
    targets,
    mixture,
    values,
    choice,
    tokens,
    width,
    label_weight,
    teacher_share,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    DRAFT: tl.constexpr,
    TOP_N: tl.constexpr,
    COMPARED: tl.constexpr,
    KL: tl.constexpr,
    REVERSE: tl.constexpr,
    JENSEN: tl.constexpr,
    TOTAL: tl.constexpr,
    DIVERGES: tl.constexpr,
    LABELS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CE, D and choice of one row, and the gradient in place of its products."""
    program, rows = tl.program_id(0), tl.num_programs(0)
    row = products + program.to(tl.int64) * width
    teacher = teachers + program.to(tl.int64) * tokens
    target = tl.load(targets + program)
    known = target >= 0
    # Read before anything is written.
    of_label = finished(tl.load(row + tl.maximum(target, 0)), scale, softcap, CAPPED)
    lse_q, threshold = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    mass, share = tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32)
    if COMPARED:
        lse_q = tl.load(lses + program)
        mass = tl.load(masses + program)
        threshold = tl.load(thresholds + program)
    if KL and TOTAL:
        share = tl.load(mixture).to(tl.float32)

    # Over all columns; and, behind a top n, over the columns compared.
    best, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    top, compared = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    chosen = tl.full((), 0, tl.int32)
    cross = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < width
        y = finished(tl.load(row + at, mask=there, other=0.0), scale, softcap, CAPPED)
        best, total, chosen, _, _ = walked(best, total, chosen, y, there, start, True)
        if KL or REVERSE or TOP_N:
            z, inside = teacher_logits(
                teacher, columns, at, there, threshold, scale, softcap, temperature, CAPPED, DRAFT, TOP_N
            )
            top, compared, _, p, shrunk = walked(top, compared, chosen, y, inside, start, True)
            if KL:
                cross += tl.sum(tl.where(inside, tl.exp(z - lse_q) * y, 0.0), 0)
            if REVERSE:
                cross = cross * shrunk + tl.sum(tl.where(inside, p * (y - z), 0.0), 0)
    tl.store(choice + program, chosen.to(tl.int64))
    lse = best + tl.log(total)
    tl.store(values + program, tl.where(known, lse - of_label, 0.0))

    lse_p = lse
    if TOP_N:
        lse_p = top + tl.log(compared)
    value = tl.full((), 0.0, tl.float32)
    of_kl, of_student, signed = value, value, value
    if KL:
        of_kl = tl.load(entropies + program) - cross + lse_p
        value = of_kl
    if REVERSE:
        value = cross / compared + lse_q - lse_p
    if JENSEN or TOTAL:
        # What needs p.
        of_teacher, overlap = value * 0.0, value * 0.0
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < width
            y = finished(tl.load(row + at, mask=there, other=0.0), scale, softcap, CAPPED)
            z, inside = teacher_logits(
                teacher, columns, at, there, threshold, scale, softcap, temperature, CAPPED, DRAFT, TOP_N
            )
            p = tl.where(inside, tl.exp(y - lse_p), 0.0)
            q = tl.where(inside, tl.exp(z - lse_q), 0.0)
            if JENSEN:
                log_m = mixed(y - lse_p, z - lse_q, teacher_share)
                of_teacher += tl.sum(q * (z - lse_q - log_m), 0)
                of_student += tl.sum(p * (y - lse_p - log_m), 0)
            else:
                overlap += tl.sum(tl.minimum(p, q * mass), 0)
                signed += tl.sum(p * sign(q * mass - p), 0)
        if JENSEN:
            value = teacher_share * of_teacher + (1.0 - teacher_share) * of_student
        elif KL:
            value = share * of_kl + (1.0 - share) * (1.0 - overlap)
        else:
            value = 1.0 - overlap
    tl.store(values + rows + program, value)

    if GRADIENT:
        label = tl.where(known, label_weight, 0.0)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < width
            y = finished(tl.load(row + at, mask=there, other=0.0), scale, softcap, CAPPED)
            grad = tl.zeros((BLOCK,), tl.float32)
            if DIVERGES:
                z, inside = teacher_logits(
                    teacher, columns, at, there, threshold, scale, softcap, temperature, CAPPED, DRAFT, TOP_N
                )
                p = tl.where(inside, tl.exp(y - lse_p), 0.0)
                q = tl.where(inside, tl.exp(z - lse_q), 0.0)
                if KL and not TOTAL:
                    grad = p - q
                elif REVERSE:
                    grad = p * (y - lse_p - z + lse_q - value)
                elif JENSEN:
                    ratio = y - lse_p - mixed(y - lse_p, z - lse_q, teacher_share)
                    grad = (1.0 - teacher_share) * p * (ratio - of_student)
                else:
                    grad = 0.5 * p * (signed - sign(q * mass - p))
                    if KL:
                        grad = share * (p - q) + (1.0 - share) * grad
            if LABELS:
                grad += label * (tl.exp(y - lse) - tl.where(at == target, 1.0, 0.0))
            if CAPPED:
                grad *= 1.0 - (y / softcap) * (y / softcap)
            tl.store(row + at, grad.to(row.dtype.element_ty), mask=there)


@triton.jit
def mixed(log_p, log_q, teacher_share):  # type: ignore[no-untyped-def]
    """The logarithm of a mixture of two probabilities, `teacher_share` of it q."""
    a, b = log_p + tl.log(1.0 - teacher_share), log_q + tl.log(teacher_share)
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def sign(x):  # type: ignore[no-untyped-def]
    """-1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)
