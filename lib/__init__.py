"""Learning from Feedback: the library behind the course's notebooks.

The shared shelf, `lib/*.py`, holds what two papers use.  It imports nothing of `lib.papers`.

runtime        folders, secrets, seed, device, dtype, progress, files that are never half written
text           words, n-grams, repetition, scripts, the fluency panel
tables         text, JSON, JSON lines and CSV: read with their lines, text kept as text
data           prompts from any source, splits, chat templates, Wikipedia's leads
encoding       texts as token ids: prompts, responses, the end, padded rows, batches
models         load any policy or build a tiny one, what trains, save
hub            names of models (name@revision#label), the Hub, weights as safetensors
adapters       LoRA through transformers' own adapters
int8           weights in 8 bits
cards          the card beside everything that was trained and kept
values         value functions that PPO trained, kept and loaded
classifiers    sequence classifiers of others as reward models
generation     sampling: tokens, texts and log-probabilities
embeddings     texts as vectors of a sentence encoder
logprobs       log p(response | prompt) of tokens, answers and texts; perplexity; KL of two models
losses         the formulas: tensors -> tensor
policy         policy, reference and value on one network
memory         what a stage holds before it runs, and how many rows fit
scorers        text -> toxicity: offline scorers, classifiers, Perspective
stats          intervals, bootstrap, paired differences, verdicts
plots          every figure as a function of a tidy table
preferences    ratings and rankings: tables, verdicts, win points, win rates
questions      questions with a closed set of answers, and what the answers' probabilities say
judge          a local language model as annotator: answers by their probabilities, stored replies
annotator      the simulated annotator and its published rubric
replies        replies that cost money or time, each bought once; Retry-After
answers        what a chat endpoint answered, and what a reply says after its reasoning
chat           the chat client: any OpenAI-compatible endpoint, stored replies, a cap on cost
sft            supervised fine-tuning
shards         fine-tuning a model too large for one GPU, in shards
reward_models  one score for a prompt and a response, from ratings or rankings
segments       segments of a response, and the token at which each ends
rewards        where rewards are paid: on tokens, segments, or whole responses
processes      several processes on one batch: shares, joined rows, what only one does
training       what stands around a training loop: seeds by key, checkpoints, history, stops
ppo            PPO in which any token may carry a reward
rloo           PPO's loop without a value function
annotate       annotation pages that work offline in a browser
fast           what is only about speed; everything works, with the same numbers, without it

papers/        what one paper alone needs: rewardlm, sparse_feedback, ilf, fine_grained, alt;
               one_hour: the comparison of them all in notebook 90
course/        what makes a notebook run: assets, gguf, fetch, record, place, show, notebooks, runner, report,
               site, publish, cli;
               arms, draw, confirm: effects of arms, their figures, the fresh seeds that decide;
               launch: a training stage on several processes;
               address, install, lab: where it comes from, a hosted Jupyter, JupyterLab;
               items, gate, annotators: what the local annotators judge, how well, their stored replies
"""

import os
import warnings

# Threads that wait should sleep, not spin: on two cores shared with one busy process, sampling was
# measured 3.5 times faster so.  Read when torch loads its OpenMP; your own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Hub libraries ask for notebook widgets, which the course does without.
warnings.filterwarnings("ignore", message="IProgress not found")
