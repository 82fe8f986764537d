"""Greedy answers by vLLM, for the Python of an environment with vLLM and without Fineloop: see `vllm_engine`."""

import ctypes
import json
import signal
import sys


def main(options: str) -> None:
    """Answer what stdin asks; the last line of stdout has the tokens of the answers."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays on the GPU of a worker that is killed
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine, answers = json.loads(options), []
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        engine["gpu_memory_utilization"] = 0.9 * free / total
    # Without the base's generation config, which may come with penalties and other ends.
    llm = LLM(**engine, enable_lora=True, skip_tokenizer_init=True, generation_config="vllm")
    for number, (adapter, prompts, most, ends) in enumerate(json.load(sys.stdin), start=1):
        lora = LoRARequest(str(number), number, adapter) if adapter else None
        greedy = SamplingParams(temperature=0, max_tokens=most, stop_token_ids=ends, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, greedy, lora_request=lora, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
