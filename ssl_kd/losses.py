"""The losses: arrays in, scalar out.

Names inside: B batch, K queue rows, M prototypes, d embedding width. Every function promotes its inputs to at least
float32 and passes `precision=HIGHEST` to its similarity products, because TPUs and GPUs default to less.
Embeddings called q, k, t, u are L2-normalised rows unless a docstring says otherwise.
"""

import chex
import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def promote(x: jax.Array) -> jax.Array:
    """The array in float32, or in float64 if it already is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalize(x: jax.Array) -> jax.Array:
    """L2-normalises rows: x / max(|x|, 1e-12), shape (..., d), at least float32."""
    x = promote(x)
    # The maximum is taken of the square: the gradient of a norm at a zero row would be NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products of the rows of `a` (B, d) with the rows of `b` (N, d): (B, N), at least float32."""
    chex.assert_rank([a, b], 2)
    return jnp.matmul(promote(a), promote(b).T, precision=HIGHEST)


def contrast_logits(q: jax.Array, k: jax.Array, queue: jax.Array, temperature: float) -> jax.Array:
    """Logits of the query against its own key, then against the queue: [q·k, q·Q] / τ.

    Args:
      q, k: (B, d) query and key of the same images.
      queue: (K, d) rows of other images' keys.
      temperature: τ.

    Returns:
      (B, 1 + K); column 0 is the image's own key.
    """
    chex.assert_equal_shape([q, k])
    own = jnp.sum(promote(q) * promote(k), axis=-1, keepdims=True)
    return jnp.concatenate([own, similarity(q, queue)], axis=1) / temperature


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """−1/B Σ_i Σ_j targets_ij · log softmax(logits_i)_j; both (B, N), target rows summing to 1."""
    chex.assert_equal_shape([logits, targets])
    return -jnp.mean(jnp.sum(promote(targets) * jax.nn.log_softmax(promote(logits)), axis=1))


def kl_divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """1/B Σ_i KL(softmax(teacher_i) ‖ softmax(student_i)) of logits; both (B, N) (CompRess)."""
    chex.assert_equal_shape([teacher, student])
    log_p, log_s = jax.nn.log_softmax(promote(teacher)), jax.nn.log_softmax(promote(student))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_s), axis=1))


def info_nce(logits: jax.Array) -> jax.Array:
    """InfoNCE over `contrast_logits` (B, 1 + K): −mean log softmax(logits)[:, 0] (MoCo, He et al. 2020, eq. 1)."""
    return -jnp.mean(jax.nn.log_softmax(promote(logits))[:, 0])


def relation_targets(relation: jax.Array) -> jax.Array:
    """Target distribution that is uniform over the positives {own key} ∪ {queue rows related by the teacher}.

    With these targets `soft_cross_entropy` is the relation contrastive loss of ReKD (reconstruction),
    L_RC = −1/B Σ_i 1/|P(i)| Σ_{p∈P(i)} log softmax(logits_i)_p, the sum outside the logarithm. A relation of all
    False gives InfoNCE.

    Args:
      relation: (B, K) bool, True where queue row j is a positive of image i.

    Returns:
      (B, 1 + K) float32; rows sum to 1.
    """
    positives = jnp.concatenate([jnp.ones((relation.shape[0], 1), bool), relation], axis=1)
    return positives / jnp.sum(positives, axis=1, keepdims=True, dtype=jnp.float32)


def sinkhorn(scores: jax.Array, epsilon: float = 0.05, iterations: int = 3) -> jax.Array:
    """Balanced codes of SwAV (Caron et al. 2020, §3.1): exp(scores / ε) scaled towards equal use of every prototype.

    Args:
      scores: (B, M) similarities of a batch to the prototypes.
      epsilon: entropy of the codes.
      iterations: pairs of column and row normalisations.

    Returns:
      (B, M) at least float32; rows sum to 1, columns to about B / M.
    """
    scores = promote(scores)
    codes = jnp.exp((scores - jnp.max(scores)) / epsilon)
    for _ in range(iterations):
        # An unused column may underflow to 0: it stays 0 instead of becoming NaN.
        codes /= jnp.maximum(jnp.sum(codes, axis=0, keepdims=True), jnp.finfo(codes.dtype).tiny)
        codes /= jnp.maximum(jnp.sum(codes, axis=1, keepdims=True), jnp.finfo(codes.dtype).tiny)
    return codes


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1/B Σ_i ‖a_i − b_i‖²; both (B, d). DisCo's consistency term sums over the batch instead."""
    chex.assert_equal_shape([a, b])
    return jnp.mean(jnp.sum(jnp.square(promote(a) - promote(b)), axis=1))


def smooth_l1(x: jax.Array) -> jax.Array:
    """x² / 2 where |x| < 1, else |x| − 1/2; elementwise."""
    return jnp.where(jnp.abs(x) < 1, 0.5 * jnp.square(x), jnp.abs(x) - 0.5)


def distance_relations(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Relational knowledge distillation by distance (Park et al., arXiv 1904.05068), as in DisCo's code.

    Mean over all B² pairs, the zero diagonal included, of smooth_l1 between the two networks' Euclidean distances, each
    divided by its mean over the pairs i ≠ j.

    Args:
      student, teacher: (B, ·) embeddings, of any two widths; B ≥ 2.
    """

    def distances(x: jax.Array) -> jax.Array:
        x = promote(x)
        square = jnp.sum(x * x, axis=1)
        squares = square[:, None] + square[None] - 2 * similarity(x, x)
        # The floor keeps the root's gradient finite where two rows coincide.
        off = ~jnp.eye(len(x), dtype=bool)
        d = jnp.where(off, jnp.sqrt(jnp.maximum(squares, 1e-12)), 0)
        return d / (jnp.sum(d) / jnp.sum(off))

    return jnp.mean(smooth_l1(distances(student) - distances(teacher)))


def angle_relations(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Relational knowledge distillation by angle (Park et al., arXiv 1904.05068), as in DisCo's code.

    Mean over all B³ triples (a, i, j) of smooth_l1 between the two networks' cosines of the angle at a.

    Args:
      student, teacher: (B, ·) embeddings, of any two widths.
    """

    def cosines(x: jax.Array) -> jax.Array:
        x = promote(x)
        # rays[a, i] points from a to i; zero where i = a. Of a difference, XLA splits the rows of its first term over
        # the devices: were that i, it would gather all B² rays on each.
        rays = normalize(-(x[:, None] - x[None, :]))
        return jnp.einsum("aid,ajd->aij", rays, rays, precision=HIGHEST)

    return jnp.mean(smooth_l1(cosines(student) - cosines(teacher)))


def dino_loss(
    student: jax.Array,
    teacher: jax.Array,
    centre: jax.Array,
    student_temperature: float | jax.Array,
    teacher_temperature: float | jax.Array,
) -> jax.Array:
    """DINO's multi-crop cross-entropy (Caron et al., arXiv 2104.14294), the H of MOKD (arXiv 2304.06461).

    Mean over the pairs of a teacher crop g and a student crop v ≠ g, and over the batch, of
    −softmax((t_g − c) / τ_t) · log softmax(s_v / τ_s).

    Args:
      student: (V, B, M) logits; its first G crops are those of the teacher.
      teacher: (G, B, M) logits.
      centre: (M,) c.
      student_temperature, teacher_temperature: τ_s and τ_t.

    Raises:
      ValueError: there is no pair, or a teacher crop that the student does not have.
    """
    crops, globals_ = len(student), len(teacher)
    if crops < 2 or crops < globals_:
        raise ValueError(f"{globals_} teacher crops and {crops} student crops: at least 2, and the teacher's first.")
    targets = jax.nn.softmax((promote(teacher) - promote(centre)) / teacher_temperature)
    student = promote(student)
    log_sums = jax.nn.logsumexp(student / student_temperature, axis=-1)
    # A pair costs log Σ exp(s_v / τ_s) − targets_g · s_v / τ_s, as the targets sum to 1. Every crop with every crop,
    # less each with itself: sums over crops come first, so that neither V · G products nor log softmax are stored.
    every = globals_ * jnp.sum(log_sums) - jnp.sum(targets.sum(0) * student.sum(0)) / student_temperature
    itself = jnp.sum(log_sums[:globals_]) - jnp.sum(targets * student[:globals_]) / student_temperature
    return (every - itself) / (globals_ * (crops - 1) * student.shape[1])
