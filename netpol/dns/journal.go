// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"time"
)

// A journal is a file of lines. Each is the CRC-32C of the rest in eight hex
// digits, a space, and one JSON value: the version first, then records in the
// order they were made. The first line that is not whole and right ends it: a
// crash tears only the last one. The file is written anew under another name
// and renamed when it has doubled, and after a write that failed.
//
// It is not synced: it lies in memory and is for the next process, not for the
// next boot.

// journalVersion is the first record of every journal.
const journalVersion = `{"bulkhead_dns_journal":1}`

// compactAt is the least size at which a journal is written anew.
const compactAt = 16 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record is one change of leases.
type record struct {
	Name    string       `json:"n"`
	Addrs   []netip.Addr `json:"a"`
	Expires []int64      `json:"x,omitempty"` // of each address, Unix milliseconds; none: the leases end
	Seen    int64        `json:"s,omitempty"` // Unix milliseconds
}

// journal appends to the file of one sandbox. It holds no descriptor: there
// may be thousands.
type journal struct {
	path  string
	size  int64 // of the lines that are right
	base  int64 // size after it was last written anew
	stale bool  // the file does not say what the state is
}

func appendLine(b, value []byte) []byte {
	b = fmt.Appendf(b, "%08x ", crc32.Checksum(value, castagnoli))
	b = append(b, value...)
	return append(b, '\n')
}

func encode(b []byte, recs []record) ([]byte, error) {
	for _, r := range recs {
		value, err := json.Marshal(r)
		if err != nil {
			return nil, fmt.Errorf("encode record of %q: %w", r.Name, err)
		}
		b = appendLine(b, value)
	}
	return b, nil
}

// append adds records. After an error the file may hold any of them; the next
// append writes it anew.
func (j *journal) append(st *state, recs ...record) error {
	if len(recs) == 0 {
		return nil
	}
	if j.stale || j.size >= max(compactAt, 2*j.base) {
		// With the records behind it, as if they had been appended.
		return j.rewrite(st, recs...)
	}
	b, err := encode(nil, recs)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		j.stale = true
		return fmt.Errorf("resolver's journal: %w", err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		j.stale = true
		return fmt.Errorf("resolver's journal: %w", err)
	}
	j.size += int64(len(b))
	return nil
}

// rewrite makes the file hold the state and the records, and nothing else.
func (j *journal) rewrite(st *state, recs ...record) error {
	j.stale = true
	b, err := encode(appendLine(nil, []byte(journalVersion)), st.records())
	if err != nil {
		return err
	}
	base := int64(len(b))
	if b, err = encode(b, recs); err != nil {
		return err
	}
	tmp := j.path + ".new" // no id has a dot
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("resolver's journal: %w", errors.Join(err, removed(tmp)))
	}
	if err := os.Rename(tmp, j.path); err != nil {
		return fmt.Errorf("resolver's journal: %w", errors.Join(err, removed(tmp)))
	}
	j.size, j.base, j.stale = int64(len(b)), base, false
	return nil
}

// removed takes a file away; nil if there is none.
func removed(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// readJournal is the leases that a file records, without their steps; none if
// there is no file. torn is what was behind the last line that is right. A
// clock that was set back must not make a lease last longer than the cap.
func readJournal(path string, now time.Time, longest time.Duration) (st *state, torn int, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newState(), 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("resolver's journal: %w", err)
	}
	st, torn = decodeJournal(b, now, longest)
	return st, torn, nil
}

func decodeJournal(b []byte, now time.Time, longest time.Duration) (st *state, torn int) {
	st = newState()
	for first := true; len(b) > 0; first = false {
		line, rest, whole := bytes.Cut(b, []byte{'\n'})
		value, ok := checkLine(line)
		if !whole || !ok {
			break
		}
		if first {
			if string(value) != journalVersion {
				break
			}
		} else if !st.apply(value, now, longest) {
			break
		}
		b = rest
	}
	return st, len(b)
}

func checkLine(line []byte) (value []byte, ok bool) {
	if len(line) < 9 || line[8] != ' ' {
		return nil, false
	}
	sum, err := strconv.ParseUint(string(line[:8]), 16, 32)
	value = line[9:]
	return value, err == nil && sum == uint64(crc32.Checksum(value, castagnoli))
}

// apply does what a record says; false if it says nothing that can be.
func (s *state) apply(value []byte, now time.Time, longest time.Duration) bool {
	var r record
	if json.Unmarshal(value, &r) != nil || !validName(r.Name) || len(r.Expires) != 0 && len(r.Expires) != len(r.Addrs) {
		return false
	}
	for i, a := range r.Addrs {
		if !a.IsValid() || a.Zone() != "" {
			return false
		}
		p := pair{r.Name, a}
		if len(r.Expires) == 0 {
			s.remove(p)
			continue
		}
		l := lease{expires: time.UnixMilli(r.Expires[i]), seen: time.UnixMilli(r.Seen)}
		if last := now.Add(longest + releaseSlack); l.expires.After(last) {
			l.expires = last
		}
		if l.seen.After(now) {
			l.seen = now
		}
		s.put(p, l, nil)
	}
	return true
}

// ends is the record that ends leases of one name.
func ends(name string, addrs []netip.Addr) record { return record{Name: name, Addrs: addrs} }
