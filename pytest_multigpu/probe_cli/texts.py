"""What every file looks like that the command reads, for ``--help``; the README has the same
examples. Imports nothing."""

from __future__ import annotations

PROBE = """\
{
  "format": "pytest-multigpu probe",
  "version": 1,
  "layers": [22],
  "index": "hidden_states",
  "hidden_size": 8192,
  "site": "raw",
  "normalize": true,
  "bias": 0.0,
  "mask": {"roles": ["assistant"], "left": 4, "right": 1, "exclude_last": 0},
  "aggregation": "mean",
  "positive_class": "deceptive",
  "model": "meta-llama/Llama-3.3-70B-Instruct",
  "dtype": "float32",
  "threshold": 1.5
}"""
"""NAME.json of the project's own format."""

HEAD = """\
{
  "layer_idx": 21,
  "hidden_size": 8192,
  "model_name": "meta-llama/Llama-3.3-70B-Instruct",
  "site": "raw",
  "aggregation": "mean",
  "mask": {"roles": ["assistant"], "left": 0, "right": 0, "exclude_last": 0},
  "positive_class": "hallucinated",
  "threshold": 0.0
}"""
"""probe_config.json."""

TRANSCRIPTS = """\
{"id": "game-1", "label": true, "messages": [{"role": "user", "content": "Who took it?"}, {"role": "assistant", "content": "Not me."}]}
{"id": "game-2", "label": false, "messages": [{"role": "user", "content": "Who took it?"}, {"role": "assistant", "content": "I did."}]}
[{"role": "user", "content": "Who took it?"}, {"role": "assistant", "content": "I don't know."}]"""  # noqa: E501

CONVERTING = f"""\
The score of a token is the mean over layers of ((x - mean) / scale) . direction, plus bias; mean
and scale only where "normalize" is true. A text's score is the mean, max or last of its scored
tokens'.

NAME.safetensors and NAME.json, which carry everything. Tensors direction.<layer>, and with a scaler
mean.<layer> and scale.<layer>, each of shape (hidden,), float16 to float64. NAME.json:

{PROBE}

  layers     as the tensors' names count them; index says how: hidden_states (0 is what the first
             block gets, i the output of block i - 1) or blocks (i is the output of block i)
  site       raw: the residual stream; final_norm: after the model's last norm
  mask       the texts of these roles, widened by so many tokens on either side (4 and 1 take in
             Llama 3's role header and its end of turn), less so many at the end. Optional, as are
             its keys: the assistant's texts alone
  aggregation  mean, max or last
  model, threshold  may be left out or null. Scores above the threshold are the positive class
  dtype      of the vectors where they came from; says nothing of the tensors here

Every other key is required, and an unknown one is an error.

A folder with probe_config.json and a linear layer's weight (1 or 2, hidden) and bias, as
probe.safetensors, probe_head.bin or probe.pt. Two rows are two classes, the second positive: the
score is their log-odds. Only layer_idx is required:

{HEAD}

  layer_idx  counts blocks: i is the output of block i. target_layer_name is read over

NAME.pt as Apollo's detector.pt, with layers and directions, and with scaler_mean, scaler_scale and
normalize where there is a scaler, or with directions as {{layer: array}} and intercept. One layer
alone is read after the final norm: give --site raw for a probe that was not fitted there.

NAME.gguf, a control vector of direction.<i>: the output of block i.

What OUT can't carry is refused by name, and nothing is written."""

SCORING = f"""\
TRANSCRIPTS holds one JSON value a line: an object with messages, or the messages alone.

{TRANSCRIPTS}

  messages   each with role and content as text, as the model's chat template takes them
  id         shown in the table; without it the line's number
  label      true or 1 if the text is of the probe's positive class, false or 0 if not; left out if
             nobody knows. With texts of both the AUROC is given with its 95% bootstrap interval

Everything that can be is checked before the model is loaded: that the probe fits, that every text
can be tokenised, has a token to score and is not too long. Probe files: convert --help."""
