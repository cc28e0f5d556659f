"""The files in which tests take longest: one of them begun last would leave other workers idle."""

# The longest first.
LONGEST = (
    "test_families.py",
    "test_faults.py",
    "test_build.py",
    "test_fuzz.py",
    "engines/test_cusparselt.py",
    "graph/test_export_pair.py",
    "pipeline/test_stale_stages.py",
    "graph/test_export.py",
    "report/test_page.py",
    "test_regression_story.py",
    "test_verdict_story.py",
    "engines/test_merge.py",
    "pipeline/test_stage_keys.py",
    "test_image_families.py",
    "test_sentence_builds.py",
    "test_python.py",
    "model/test_dtypes.py",
    "packaging/test_package.py",
    "test_speech_families.py",
    "test_decode_builds.py",
    "graph/test_decoding.py",
    "pipeline/test_single_stages.py",
)
