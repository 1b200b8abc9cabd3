-- Settles what a consumer has taken. All but 'ack' touch only what is still its own.
-- Rings the bell, 'TOPIC', for what others may take again.
-- KEYS: stream, dead letters
-- ARGV: bell, topic, group, consumer, lease in ms, dead letters to keep, then verb and id in turns:
--   ack      it is done
--   release  it was begun and is left to others, at once
--   return   it was never begun: the same, and this delivery does not count
--   renew    it is being worked on, so the lease begins anew
--   bury     nobody will get it again
local stream, dead = KEYS[1], KEYS[2]
local group, consumer, lease = ARGV[3], ARGV[4], ARGV[5]
local released = false

local function claim(id, ...)
  redis.call('XCLAIM', stream, group, consumer, 0, id, ...)
end

local function bury(id)
  for _, entry in ipairs(redis.call('XRANGE', stream, id, id)) do
    redis.call('XADD', dead, 'MAXLEN', '~', ARGV[6], '*', unpack(entry[2]))
  end
  redis.call('XACK', stream, group, id)
end

for i = 7, #ARGV, 2 do
  local verb, id = ARGV[i], ARGV[i + 1]
  if verb == 'ack' then
    redis.call('XACK', stream, group, id)
  else
    local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
    if pending and pending[2] == consumer then
      if verb == 'bury' then
        bury(id)
      elseif verb == 'renew' then
        claim(id, 'JUSTID')
      elseif verb == 'release' then
        claim(id, 'IDLE', lease, 'JUSTID')
      else
        claim(id, 'IDLE', lease, 'RETRYCOUNT', math.max(pending[4] - 1, 0), 'JUSTID')
      end
      released = released or verb == 'release' or verb == 'return'
    end
  end
end
if released then
  redis.call('PUBLISH', ARGV[1], ARGV[2])
end
