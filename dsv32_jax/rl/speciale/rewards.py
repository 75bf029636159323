"""DeepSeekMath-V2's rewards of verifiers and of generators that verify.

Scores of proofs and of analyses are 0, 0.5 or 1; rewards lie between 0 and 1.
Source: arXiv:2511.22570, sections 2.1 and 2.2.
"""

GENERATOR_WEIGHTS = (0.76, 0.24)
"""Of the proof (alpha), and of what its author says about it (beta)."""


def agreement(predicted: float, true: float) -> float:
  """1 - |s' - s|: R_score.

  >>> agreement(0.5, 1.0)
  0.5
  """
  _check(predicted=predicted, true=true)
  return 1.0 - abs(predicted - true)


def verifier_reward(
  *, is_formed: bool, predicted: float, true: float, meta: float
) -> float:
  """R_V = R_format * R_score * R_meta.

  Args:
    is_formed: whether the analysis could be read.
    predicted: the score that it gives.
    true: the label of the proof.
    meta: quality of the analysis by a meta-verifier; 1 leaves it out, as the
      first verifier of the paper is trained.

  Raises:
    ValueError: if a score is not between 0 and 1.

  >>> verifier_reward(is_formed=True, predicted=1.0, true=0.5, meta=1.0)
  0.5
  """
  _check(meta=meta)
  return float(is_formed) * agreement(predicted, true) * meta


def generator_reward(
  *,
  is_formed: bool,
  proof: float,
  predicted: float,
  meta: float,
  weights: tuple[float, float] = GENERATOR_WEIGHTS,
) -> float:
  """R = R_format(Y, Z) * (alpha R_Y + beta R_Z), R_Z = R_score * R_meta(Z).

  A faulty proof whose author says what is wrong with it earns more than one
  whose author is sure of it; a right proof more than either.

  Args:
    is_formed: whether both the proof Y and the self-analysis Z could be read.
    proof: R_Y, the verifier's score of the proof.
    predicted: s', the score that the self-analysis gives.
    meta: R_meta, quality of the self-analysis.
    weights: alpha and beta; they add up to 1.

  Raises:
    ValueError: if a score is not between 0 and 1, or the weights do not add up.

  >>> round(
  ...   generator_reward(is_formed=True, proof=0.0, predicted=0.0, meta=1.0), 9
  ... )
  0.24
  """
  alpha, beta = weights
  if min(weights) < 0 or abs(alpha + beta - 1.0) > 1e-9:
    raise ValueError(
      f'weights: got {weights}, expected two of at least 0 that add up to 1'
    )
  _check(proof=proof, meta=meta)
  own = agreement(predicted, proof) * meta
  return float(is_formed) * (alpha * proof + beta * own)


def _check(**scores: float) -> None:
  for name, score in scores.items():
    if not 0.0 <= score <= 1.0:
      raise ValueError(f'{name}: got {score}, expected 0 to 1')
