"""
The `lamb` command.

    lamb caption sound.wav more.flac [--model FOLDER_OR_ID] [--prompt TEXT] [--candidates 12] [--beams 4] [--chunk-seconds 10]
"""

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lamb", description="Audio captions from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    caption = commands.add_parser("caption", help="print a caption for each sound file")
    caption.add_argument("audio", nargs="+", help="sound files (WAV, FLAC, OGG, MP3) or URLs")
    caption.add_argument("--model", help="a LAMB folder or Hub id; without it, the model that is shipped")
    caption.add_argument("--prompt", help="what to ask instead of the model's own question")
    caption.add_argument("--beams", type=int, help="beams of the search")
    caption.add_argument("--candidates", type=int, help="captions to write, of which the nearest to the audio is kept")
    caption.add_argument("--guide-weight", type=float, help="weight of the Token Guide instead of the learned one")
    caption.add_argument("--chunk-seconds", type=float, help="caption long recordings window by window")
    caption.add_argument("--json", action="store_true", help="one JSON object a file, with the windows' times")
    options = parser.parse_args(arguments)

    from transformers import AutoProcessor  # after parsing, so that --help is instant
    from transformers.utils import logging

    from . import AudioCaptioningPipeline, LambForAudioCaptioning, default_checkpoint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = options.model or default_checkpoint()
    captioner = AudioCaptioningPipeline(
        model=LambForAudioCaptioning.from_pretrained(name), processor=AutoProcessor.from_pretrained(name)
    )
    settings = {
        "prompt": options.prompt,
        "num_beams": options.beams,
        "num_candidates": options.candidates,
        "token_guide_weight": options.guide_weight,
        "chunk_length_s": options.chunk_seconds,
        "return_timestamps": True if options.chunk_seconds else None,
        "on_error": "return",
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    failures = 0
    for path in options.audio:
        result = captioner(path, **settings)[0]
        failures += "error" in result
        if options.json:
            print(json.dumps({"audio": path, **result}))
        elif "error" in result:
            print(f"{path}: {result['error']}", file=sys.stderr)
        else:
            print(result["generated_text"] if len(options.audio) == 1 else f"{path}: {result['generated_text']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
