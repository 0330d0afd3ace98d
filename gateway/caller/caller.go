// SPDX-License-Identifier: Apache-2.0

// Package caller says who is at the other end of a call and what they may do.
//
// Over the unix socket it is whoever the socket's mode lets in; they may do
// everything. Over TLS it is the names of a certificate that the node CA has
// signed: a node may push and ask for the watermark under its own name only,
// an operator may read usage. The handshake has verified the certificate; this
// package looks again at its end of life, because connections live long.
package caller

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// MayPush answers a gRPC status if the caller is not the node.
func MayPush(ctx context.Context, node string) error {
	local, names, err := who(ctx)
	if err != nil || local || slices.Contains(names, node) {
		return err
	}
	return status.Errorf(codes.PermissionDenied, "certificate is for %q, not for node %q", names, node)
}

// MayQuery answers a gRPC status if the caller is none of the operators.
func MayQuery(ctx context.Context, operators []string) error {
	local, names, err := who(ctx)
	if err != nil || local || slices.ContainsFunc(names, func(n string) bool { return slices.Contains(operators, n) }) {
		return err
	}
	return status.Errorf(codes.PermissionDenied, "certificate is for %q, which is none of tls.operators", names)
}

// who answers local for the unix socket, else the certificate's names.
func who(ctx context.Context) (local bool, names []string, err error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false, nil, status.Error(codes.Unauthenticated, "caller is not known")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		if p.Addr.Network() == "unix" {
			return true, nil, nil
		}
		return false, nil, status.Error(codes.Unauthenticated, "caller has shown no certificate")
	}
	if len(info.State.VerifiedChains) == 0 {
		return false, nil, status.Error(codes.Unauthenticated, "caller has shown no certificate")
	}
	leaf := info.State.VerifiedChains[0][0]
	if time.Now().After(leaf.NotAfter) {
		return false, nil, status.Errorf(codes.Unauthenticated, "certificate ended on %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	names = slices.Clone(leaf.DNSNames)
	if leaf.Subject.CommonName != "" {
		names = append(names, leaf.Subject.CommonName)
	}
	return false, names, nil
}
