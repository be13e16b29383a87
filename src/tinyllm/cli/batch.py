"""tinyllm batch: answers the rows of a file into another, on this machine or on those of a Ray cluster.

Imports common.py; batch/ or ray/ once the command line is read.
"""

from __future__ import annotations

import sys

from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    add_sampling_options,
    add_speculation_options,
    counted,
    load_model,
    note,
    positive,
    progress_bar,
    run_command,
    sampling_fields,
)

PROG = "tinyllm batch"

DESCRIPTION = """Answers every row of a JSONL file: prompts, messages, or OpenAI's batch format. Run again, it
goes on where it ended."""

EPILOG = f"""rows:
  {{"id": "a", "prompt": "Once upon a time", "max_tokens": 50}}
  {{"id": "b", "messages": [{{"role": "user", "content": "Hello"}}], "temperature": 0}}
  {{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {{...}}}}

examples:
  {PROG} model.gguf in.jsonl out.jsonl
  {PROG} model.gguf in.jsonl out.jsonl --name gpt-4o-mini   as rows in OpenAI's format call the model
  {PROG} /shared/model.gguf in.jsonl out.jsonl --ray auto --workers 8   on a Ray cluster

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    options = sampling_fields(args)
    seed = options.pop("seed", 0)
    if args.ray is None and args.workers is not None:
        raise UsageError("--workers are a cluster's: give --ray ADDRESS")
    with progress_bar("rows") as progress:
        if args.ray is None:
            from tinyllm.batch import Job, Rows, run_file

            with load_model(args.model, args) as llm:
                rows = Rows(llm, seed=seed, at_once=args.at_once, options=options, name=args.name)
                job = Job(llm.identity, seed, options)
                totals = run_file(rows.results, args.rows, args.out, job, progress=progress)
        else:
            from tinyllm.ray import generate_file

            names = ("device", "threads", "context", "cache_type", "weights", "draft", "speculate")
            totals = generate_file(
                args.model,
                args.rows,
                args.out,
                address=args.ray,
                workers=args.workers or 1,
                at_once=args.at_once,
                seed=seed,
                options=options,
                name=args.name,
                load={name: getattr(args, name) for name in names},
                progress=progress,
            )
    before = f", {totals.before} were there before" if totals.before else ""
    failed = f", {counted(totals.failed, 'row')} failed: see their error" if totals.failed else ""
    note(f"{totals.done} of {counted(totals.rows, 'row')} done{before}{failed}")
    return EXIT_ERROR if totals.failed else EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL IN.jsonl OUT.jsonl [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser)
    parser.add_argument("rows", metavar="IN.jsonl", help="a JSON object a line")
    parser.add_argument("out", metavar="OUT.jsonl", help="results, a line a row, as they come")
    parser.add_argument("--name", metavar="NAME", help="what OpenAI's rows call MODEL (default: its path)")
    parser.add_argument(
        "--at-once",
        type=positive,
        default=32,
        metavar="N",
        help="rows that are computed together; never changes a result (default: 32)",
    )
    cluster = parser.add_argument_group("cluster", "Rows on many machines (pip install 'ray[data,serve]').")
    cluster.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster; auto, or local for one here")
    cluster.add_argument(
        "--workers", type=positive, metavar="N", help="processes with the model, one a machine (default: 1)"
    )
    add_model_options(parser)
    add_speculation_options(parser)
    add_sampling_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
