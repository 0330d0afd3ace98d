// SPDX-License-Identifier: Apache-2.0

// Package usagev1 holds usage records: the messages, and what every reader and
// writer of them must agree on. canonical.go has the bytes that are hashed,
// meter.go the names of meters and what makes a record well formed.
package usagev1

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// HashLen is the length of prev_hash and hash.
const HashLen = sha256.Size

// canonicalVersion begins the canonical bytes. A record written by a version
// with other fields begins with another text.
const canonicalVersion = "bulkhead-usage-1"

// ErrChain is wrapped by every error of VerifyChain.
var ErrChain = errors.New("usage chain broken")

// CanonicalBytes is what a record's hash is made of. It does not depend on how
// protobuf encodes the record. The bytes are
//
//	"bulkhead-usage-1"
//	source id node_seq prev_hash tenant sandbox workload_ref policy_rev meter
//	start_ns end_ns mono_ns delta cumulative resource quality corrects sandbox_name
//
// that is every field but hash in the order of its number. A text or bytes
// field is its length as 4 bytes, then its bytes. A number is 8 bytes, signed
// ones in two's complement. Resource is one byte, 0 if it is not set, or 1
// followed by its own fields in the same way. All numbers are big endian.
func CanonicalBytes(r *Record) []byte {
	b := make([]byte, 0, 512)
	b = append(b, canonicalVersion...)
	b = appendText(b, r.Source)
	b = appendText(b, r.Id)
	b = binary.BigEndian.AppendUint64(b, r.NodeSeq)
	b = appendText(b, r.PrevHash)
	b = appendText(b, r.Tenant)
	b = appendText(b, r.Sandbox)
	b = appendText(b, r.WorkloadRef)
	b = binary.BigEndian.AppendUint64(b, r.PolicyRev)
	b = appendText(b, r.Meter)
	b = binary.BigEndian.AppendUint64(b, uint64(r.StartNs))
	b = binary.BigEndian.AppendUint64(b, uint64(r.EndNs))
	b = binary.BigEndian.AppendUint64(b, uint64(r.MonoNs))
	b = binary.BigEndian.AppendUint64(b, r.Delta)
	b = binary.BigEndian.AppendUint64(b, r.Cumulative)
	if res := r.Resource; res == nil {
		b = append(b, 0)
	} else {
		b = append(b, 1)
		b = appendText(b, res.GpuUuid)
		b = appendText(b, res.MigUuid)
		b = appendText(b, res.Profile)
		b = binary.BigEndian.AppendUint64(b, uint64(res.FractionNum))
		b = binary.BigEndian.AppendUint64(b, uint64(res.FractionDen))
	}
	b = binary.BigEndian.AppendUint64(b, uint64(int64(r.Quality)))
	b = appendText(b, r.Corrects)
	return appendText(b, r.SandboxName)
}

func appendText[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// ZeroHash is prev_hash of the first record of a node.
func ZeroHash() []byte { return make([]byte, HashLen) }

// Hash is SHA-256 over prev, the hash of the record before, and the canonical
// bytes of r. The answer is HashLen bytes long.
func Hash(prev []byte, r *Record) []byte {
	h := sha256.New()
	h.Write(prev)
	h.Write(CanonicalBytes(r))
	return h.Sum(nil)
}

// VerifyChain checks that r follows the record with prevSeq and prevHash, and
// that its hash is its own. The first record of a node follows 0 and ZeroHash.
func VerifyChain(prevSeq uint64, prevHash []byte, r *Record) error {
	if r.NodeSeq != prevSeq+1 {
		return fmt.Errorf("%w: node_seq %d follows %d", ErrChain, r.NodeSeq, prevSeq)
	}
	if !bytes.Equal(r.PrevHash, prevHash) {
		return fmt.Errorf("%w: prev_hash of node_seq %d is not the hash of node_seq %d", ErrChain, r.NodeSeq, prevSeq)
	}
	if !bytes.Equal(r.Hash, Hash(prevHash, r)) {
		return fmt.Errorf("%w: node_seq %d does not have the content that it was hashed with", ErrChain, r.NodeSeq)
	}
	return nil
}
