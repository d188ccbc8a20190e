#!/usr/bin/env bash
# Generate an image with curl, and download it from its address: examples/curl.sh [PROMPT].
# BASE_URL, API_KEY, SIZE, STEPS, SEED and OUTPUT in the environment say where, how and what.
set -euo pipefail
base="${BASE_URL:-http://127.0.0.1:8000}"
prompt="${1:-a yellow star on a black background}"
output="${OUTPUT:-image-curl.png}"

answer="$(curl --silent --show-error --fail-with-body "$base/v1/images/generations" \
    --header "Authorization: Bearer ${API_KEY:-unused}" \
    --header "Content-Type: application/json" \
    --data "{
        \"prompt\": \"$prompt\",
        \"size\": \"${SIZE:-auto}\",
        \"num_inference_steps\": ${STEPS:-null},
        \"seed\": ${SEED:-14},
        \"response_format\": \"url\"
    }")" || { echo "$answer" >&2; exit 1; }

# The address needs no key, and lives for an hour.
address="$(sed -E 's/.*"url": ?"([^"]+)".*/\1/' <<<"$answer")"
curl --silent --show-error --fail --output "$output" "$address"
echo "Wrote $output from $address."
