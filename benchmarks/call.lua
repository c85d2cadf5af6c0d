-- One fixed POST, sent over and over; ends with one line of JSON for the program that started wrk.
wrk.method = "POST"
wrk.body = os.getenv("BENCH_BODY")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-API-Key"] = os.getenv("BENCH_KEY")

local line = '{"calls":%d,"duration_us":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,'
  .. '"p50_us":%d,"p99_us":%d}\n'

done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(line, summary.requests, summary.duration, errors.connect, errors.read, errors.write,
    errors.status, errors.timeout, latency:percentile(50), latency:percentile(99)))
end
