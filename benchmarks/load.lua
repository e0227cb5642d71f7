-- wrk -s load.lua URL -- PATH COUNT [JSON]: GETs PATH, or POSTs the JSON. "{id}" in the path becomes
-- the numbers from 1 to COUNT, each once before it begins again.
local requests = {}
local last = 0

function init(arguments)
  local path, count, json = arguments[1], tonumber(arguments[2]), arguments[3]
  local method = json and "POST" or "GET"
  local headers = json and { ["Content-Type"] = "application/json" }
  for n = 1, count do
    local id = n * 397 % count + 1 -- a prime, so that neighbours are far apart
    requests[n] = wrk.format(method, (path:gsub("{id}", id)), headers, json)
  end
end

function request()
  last = last % #requests + 1
  return requests[last]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "microseconds": %d, "refused": %d, "socket_errors": %d, "p50": %d, "p99": %d}\n',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
