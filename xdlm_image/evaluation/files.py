"""The old home of `xdlm_image.files`, kept while other rooms still import from here; it owns nothing."""

from xdlm_image.files import sha256_of_file, write_atomic, write_json, write_text

__all__ = ["sha256_of_file", "write_atomic", "write_json", "write_text"]
