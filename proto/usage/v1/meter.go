// SPDX-License-Identifier: Apache-2.0

package usagev1

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Meters that this version knows. The unit is in the name. A ledger stores
// well-formed names that it does not know: a newer node may have more meters.
const (
	MeterCPU         = "cpu_ns"          // CPU time used, nanoseconds
	MeterMemReserved = "mem_mib_ms"      // memory limit times time, MiB milliseconds: 1 TiB for a year in bytes is beyond 64 bits
	MeterMemUsed     = "mem_used_mib_ms" // memory used times time, MiB milliseconds
	MeterEgress      = "egress_bytes"    // L3 bytes that policy let out
	MeterIngress     = "ingress_bytes"   // L3 bytes that came in
	MeterWall        = "wall_ms"         // time that the sandbox held its place, milliseconds
)

// Meters lists the known meters in the order in which they are reported.
func Meters() []string {
	return []string{MeterCPU, MeterMemReserved, MeterMemUsed, MeterEgress, MeterIngress, MeterWall}
}

// Bounds of a record, in bytes. They keep a batch of 1000 records small enough
// to be one message and a ledger row small enough to be indexed.
const (
	MaxSource       = 256
	MaxID           = 256
	MaxTenant       = 256
	MaxSandboxName  = 256
	MaxWorkloadRef  = 1024
	MaxMeter        = 64
	MaxResourceText = 256

	// SandboxIDLen is the length of a sandbox id, characters of [a-z2-7].
	SandboxIDLen = 12
)

// ErrInvalid is wrapped by every error of Validate.
var ErrInvalid = errors.New("malformed usage record")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// ID is a record's id taken apart.
type ID struct {
	Sandbox    string
	Meter      string
	Generation uint64
	Seq        uint64 // of this sandbox and meter, from 1
}

// String is the form in Record.id: <sandbox>/<meter>/<generation>/<seq>.
func (id ID) String() string {
	return id.Sandbox + "/" + id.Meter + "/" +
		strconv.FormatUint(id.Generation, 10) + "/" + strconv.FormatUint(id.Seq, 10)
}

// ParseID takes a record's id apart. Only the form that String makes is
// accepted, so two ids are equal exactly if their texts are.
func ParseID(s string) (ID, error) {
	if len(s) > MaxID {
		return ID{}, invalid("id is %d bytes long, at most %d are allowed", len(s), MaxID)
	}
	parts := strings.Split(s, "/")
	if len(parts) != 4 {
		return ID{}, invalid("id %q: want <sandbox>/<meter>/<generation>/<seq>", s)
	}
	id := ID{Sandbox: parts[0], Meter: parts[1]}
	var err error
	if id.Generation, err = strconv.ParseUint(parts[2], 10, 64); err != nil {
		return ID{}, invalid("id %q: generation is not a number", s)
	}
	if id.Seq, err = strconv.ParseUint(parts[3], 10, 64); err != nil || id.Seq == 0 {
		return ID{}, invalid("id %q: sequence is not a number from 1", s)
	}
	if !validSandbox(id.Sandbox) {
		return ID{}, invalid("id %q: sandbox id is not %d characters of [a-z2-7]", s, SandboxIDLen)
	}
	if err := ValidMeter(id.Meter); err != nil {
		return ID{}, err
	}
	if id.String() != s {
		return ID{}, invalid("id %q: numbers are written without sign or leading zeros", s)
	}
	return id, nil
}

// Source is the form in Record.source: node/<node id>/boot/<boot id>.
func Source(nodeID, bootID string) string { return "node/" + nodeID + "/boot/" + bootID }

// ParseSource takes a record's source apart.
func ParseSource(s string) (nodeID, bootID string, err error) {
	if len(s) > MaxSource {
		return "", "", invalid("source is %d bytes long, at most %d are allowed", len(s), MaxSource)
	}
	parts := strings.Split(s, "/")
	if len(parts) != 4 || parts[0] != "node" || parts[2] != "boot" || !validToken(parts[1]) || !validToken(parts[3]) {
		return "", "", invalid("source %q: want node/<node id>/boot/<boot id>", s)
	}
	return parts[1], parts[3], nil
}

// ValidMeter reports whether name may name a meter: a lower case letter, then
// lower case letters, digits and underscores.
func ValidMeter(name string) error {
	if name == "" || len(name) > MaxMeter {
		return invalid("meter name is %d bytes long, want 1 to %d", len(name), MaxMeter)
	}
	for i := range len(name) {
		c := name[i]
		if c >= 'a' && c <= 'z' || i > 0 && (c >= '0' && c <= '9' || c == '_') {
			continue
		}
		return invalid("meter name %q: want [a-z][a-z0-9_]*", name)
	}
	return nil
}

// Validate checks everything about a record that can be checked without
// knowing any other. It accepts a record that has no node_seq and hashes yet;
// VerifyChain demands them.
func Validate(r *Record) error {
	if r == nil {
		return invalid("no record")
	}
	if len(r.ProtoReflect().GetUnknown()) > 0 || len(r.GetResource().ProtoReflect().GetUnknown()) > 0 {
		return invalid("%q has fields that this version does not know; its hash cannot be checked", r.Id)
	}
	if _, _, err := ParseSource(r.Source); err != nil {
		return err
	}
	id, err := ParseID(r.Id)
	if err != nil {
		return err
	}
	if id.Sandbox != r.Sandbox {
		return invalid("%s: sandbox is %q", r.Id, r.Sandbox)
	}
	if id.Meter != r.Meter {
		return invalid("%s: meter is %q", r.Id, r.Meter)
	}
	if r.Tenant == "" {
		return invalid("%s: no tenant", r.Id)
	}
	for _, f := range []struct {
		name, text string
		limit      int
	}{
		{"tenant", r.Tenant, MaxTenant},
		{"workload_ref", r.WorkloadRef, MaxWorkloadRef},
		{"sandbox_name", r.SandboxName, MaxSandboxName},
		{"resource.gpu_uuid", r.Resource.GetGpuUuid(), MaxResourceText},
		{"resource.mig_uuid", r.Resource.GetMigUuid(), MaxResourceText},
		{"resource.profile", r.Resource.GetProfile(), MaxResourceText},
	} {
		if len(f.text) > f.limit {
			return invalid("%s: %s is %d bytes long, at most %d are allowed", r.Id, f.name, len(f.text), f.limit)
		}
		if !utf8.ValidString(f.text) {
			return invalid("%s: %s is not UTF-8", r.Id, f.name)
		}
	}
	if r.Corrects != "" {
		if _, err := ParseID(r.Corrects); err != nil {
			return fmt.Errorf("%s: corrects: %w", r.Id, err)
		}
	}
	return validateQuantities(r)
}

func validateQuantities(r *Record) error {
	switch {
	case r.EndNs < r.StartNs:
		return invalid("%s: ends before it starts", r.Id)
	case r.MonoNs < 0:
		return invalid("%s: mono_ns is negative", r.Id)
	case r.Cumulative < r.Delta:
		return invalid("%s: cumulative is less than delta", r.Id)
	case r.Quality == Quality_QUALITY_UNSPECIFIED:
		return invalid("%s: no quality", r.Id)
	case r.Quality < 0 || Quality_name[int32(r.Quality)] == "":
		return invalid("%s: quality %d is not known", r.Id, r.Quality)
	case r.Quality == Quality_QUALITY_GAP && r.Delta != 0:
		return invalid("%s: a gap has a delta", r.Id)
	case len(r.PrevHash) != 0 && len(r.PrevHash) != HashLen:
		return invalid("%s: prev_hash is %d bytes long", r.Id, len(r.PrevHash))
	case len(r.Hash) != 0 && len(r.Hash) != HashLen:
		return invalid("%s: hash is %d bytes long", r.Id, len(r.Hash))
	}
	if res := r.Resource; res != nil && (res.FractionDen == 0 || res.FractionNum > res.FractionDen) {
		return invalid("%s: fraction %d/%d is not between 0 and 1", r.Id, res.FractionNum, res.FractionDen)
	}
	return nil
}

func validSandbox(s string) bool {
	if len(s) != SandboxIDLen {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// validToken reports whether s is a node or boot id: letters, digits, dot, dash, underscore.
func validToken(s string) bool {
	if s == "" || len(s) > 100 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' {
			continue
		}
		return false
	}
	return true
}
