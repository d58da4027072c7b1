# SPDX-License-Identifier: Apache-2.0
"""`nearkv generate` with every class of language model that transformers has, small and random.

Each answers what its own attention answers, or ends in one line that says why not.
"""

import copy
import functools
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nearkv import cli

pytestmark = pytest.mark.usefixtures("one_thread")

# What sizes are called, over all configurations.
_SIZES = {
    64: "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim intermediate_size "
    "n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff mamba_d_head",
    32: "head_dim qk_head_dim kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "moe_intermediate_size shared_expert_intermediate_size",
    16: "q_lora_rank state_size mamba_d_state",
    4: "conv_kernel",
    2: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_experts num_local_experts "
    "n_routed_experts moe_num_experts mamba_n_heads",
    1: "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_k "
    "moe_topk n_group topk_group n_shared_experts mamba_n_groups bos_token_id decoder_start_token_id",
    0: "pad_token_id",
    100: "vocab_size",
    512: "max_position_embeddings n_positions max_seq_len",
    0.2: "initializer_range init_std",
    None: "eos_token_id",
}  # fmt: skip
_SMALL = {name: value for value, names in _SIZES.items() for name in names.split()}
_PARTS = ("text_config", "llm_config", "thinker_config", "decoder")
_MOST_PARAMETERS = 8_000_000
_NEW = 8  # tokens of an answer; fewer are printed where some count as special

ANSWERS = ("llama", "mixtral", "gpt2", "gpt_neox", "opt", "phi", "gemma", "biogpt", "starcoder2")
REFUSED = (
    "bloom",
    "falcon",
    "gptj",
    "codegen",
    "mpt",
    "rwkv",
    "openai-gpt",
    "xlnet",
    "mamba",
    "gemma2",
)


def _small(config) -> dict:
    return {name: _SMALL[name] for name in config.to_dict() if name in _SMALL}


def _config(model_type: str):
    make = CONFIG_MAPPING[model_type]
    whole = make()
    text = whole.get_text_config(decoder=True)
    part = next((name for name in _PARTS if text is not whole and name in whole.to_dict()), None)
    if part is None:
        config = make(**_small(whole))
    else:
        config = make(**{part: {**_small(text), "model_type": text.model_type}})
    for one in (config, config.get_text_config(decoder=True)):
        if getattr(one, "is_decoder", None) is False:
            one.is_decoder = True
        if len(getattr(one, "layer_types", None) or ()) > one.num_hidden_layers:
            one.layer_types = list(one.layer_types)[: one.num_hidden_layers]
    return config


def _saved(model_type: str, directory) -> str | None:
    """None, or why no small model of this type can be saved."""
    try:
        config = _config(model_type)
        with torch.device("meta"):
            sketch = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        if sketch.num_parameters() > _MOST_PARAMETERS:
            return "cannot be made small with the usual names of sizes"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        model.save_pretrained(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def save(save_tokenizer):
    def save(model_type: str, directory) -> str | None:
        problem = _saved(model_type, directory)
        if problem is None:
            save_tokenizer(directory)
        return problem

    return save


def _outcome(capsys, directory) -> tuple[int, str, str]:
    """The command's exit status and what it said; a traceback ends the test."""
    prompt = " ".join(f"w{7 * n % 97 + 2}" for n in range(70))
    capsys.readouterr()
    code = cli.main(
        ["generate", "--model", str(directory), "--prompt", prompt, "--max-new-tokens", str(_NEW),
         "--page-tokens", "32"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code in (0, 2)
    if code:
        assert out == ""
        err = err.removeprefix(f"> {prompt}\n\n")  # what was asked, if it came so far
        assert err.startswith("nearkv: error: ")
        assert err.count("\n") == 1, err
        return code, "", err
    answer = [int(word[1:]) for word in out.split()]
    _assert_is_the_models_own(directory, [int(word[1:]) for word in prompt.split()], answer)
    return code, out, err


def _assert_is_the_models_own(directory, prompt, answer) -> None:
    """The answer is that of the model's own attention, as far as that is sure of it."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    own = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        use_cache=False,
    )  # of some classes, transformers' own cache fails
    for scores, theirs, ours in zip(
        own.scores, own.sequences[0, len(prompt) :], answer, strict=False
    ):
        if ours != theirs:
            assert len(answer) < _NEW or scores[0, theirs] - scores[0, ours] < 0.05 * scores.std()
            break


def _quiet(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that transformers itself no longer likes
            test(*args, **kwargs)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ANSWERS)
@_quiet
def test_a_class_that_nearkv_can_serve_answers_as_with_its_own_attention(
    capsys, tmp_path, save, model_type
):
    assert save(model_type, tmp_path) is None
    code, _, err = _outcome(capsys, tmp_path)
    assert code == 0, err
    assert " jobs; " in err
    assert "for 0 jobs" not in err


@pytest.mark.parametrize("model_type", REFUSED)
@_quiet
def test_a_class_that_it_cannot_serve_ends_in_one_line(capsys, tmp_path, save, model_type):
    assert save(model_type, tmp_path) is None
    code, _, err = _outcome(capsys, tmp_path)
    assert code == 2
    assert f"model {tmp_path}" in err


@pytest.mark.slow
@_quiet
def test_every_class_answers_or_ends_in_one_line(capsys, tmp_path, save):
    codes = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if save(model_type, tmp_path / model_type) is None:
            codes[model_type] = _outcome(capsys, tmp_path / model_type)[0]
    assert len(codes) > 100
    assert list(codes.values()).count(0) > 40


# --- positions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opt(tmp_path_factory, save):
    """With 40 learned positions."""
    directory = tmp_path_factory.mktemp("opt")
    assert save("opt", directory) is None
    torch.manual_seed(0)
    config = OPTConfig.from_pretrained(directory, max_position_embeddings=40)
    OPTForCausalLM(config).save_pretrained(directory)
    return directory


def _generate(capsys, directory, n_prompt: int, n_new: int):
    capsys.readouterr()
    code = cli.main(["generate", "--model", str(directory), "--prompt", " ".join(["w1"] * n_prompt),
                     "--max-new-tokens", str(n_new)])  # fmt: skip
    return code, *capsys.readouterr()


def test_learned_positions_must_suffice(capsys, opt):
    code, out, err = _generate(capsys, opt, 31, 10)  # the last token is never put in
    assert code == 0, err
    code, out, err = _generate(capsys, opt, 32, 10)
    assert (code, out) == (2, "")
    assert (
        "prompt and new tokens are 42 tokens together, and OPTForCausalLM has learned 40 pos" in err
    )
    assert err.count("\n") == 1


def test_beyond_computed_positions_there_is_a_warning(capsys, tmp_path, save):
    assert save("llama", tmp_path) is None
    code, out, err = _generate(capsys, tmp_path, 510, 4)
    assert code == 0
    assert "512" in err
    assert err.startswith(
        "warning: prompt and new tokens are 514 tokens together, and LlamaForCausalLM"
    )
    assert len(out.split()) == 4


def test_greedy_decoding_ignores_a_models_own_ways_of_sampling(capsys, tmp_path, save):
    assert save("llama", tmp_path) is None
    plain = _generate(capsys, tmp_path, 5, 4)
    assert plain[0] == 0
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "num_beams": 4, "max_length": 9, '
        '"num_return_sequences": 3, "cache_implementation": "static", "use_cache": false, '
        '"penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3}'
    )
    code, out, err = _generate(capsys, tmp_path, 5, 4)
    assert (code, out) == plain[:2]
    assert err.count("\n") == plain[2].count("\n")


def test_a_prompt_without_tokens_is_refused(capsys, tmp_path, save):
    assert save("llama", tmp_path) is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ '' }}"
    tokenizer.save_pretrained(tmp_path)
    code, _, err = _generate(capsys, tmp_path, 5, 4)
    assert (code, err) == (2, "nearkv: error: the tokenizer makes no tokens of this prompt\n")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path)
    code, _, err = _generate(capsys, tmp_path, 5, 4)
    assert code == 2
    assert "LlamaForCausalLM cannot be prompted: TemplateError: no such role\n" in err
