// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/tenant"
)

// Caller is who is at the other end of the socket, as the kernel says it.
type Caller struct {
	UID, GID uint32
	PID      int32
}

// String is how a caller appears in records: "uid:1000".
func (c Caller) String() string { return fmt.Sprintf("uid:%d", c.UID) }

// AuthType makes a Caller a credentials.AuthInfo.
func (Caller) AuthType() string { return "peercred" }

// peerCred are transport credentials that hand on what the kernel said of a
// connection when it was accepted, see door.
type peerCred struct{}

func (peerCred) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, nil, nil
}

func (peerCred) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	pc, ok := c.(*peerConn)
	if !ok {
		return nil, nil, fmt.Errorf("caller on %T: did not come in by the door", c)
	}
	return c, pc.who, nil
}

// peerOf asks the kernel who connected.
func peerOf(c net.Conn) (Caller, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return Caller{}, fmt.Errorf("caller on %T: only a unix socket says who calls", c)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Caller{}, err
	}
	if credErr != nil {
		return Caller{}, fmt.Errorf("read SO_PEERCRED: %w", credErr)
	}
	return Caller{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}

func (peerCred) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (p peerCred) Clone() credentials.TransportCredentials { return p }
func (peerCred) OverrideServerName(string) error           { return nil }

// caller answers who is calling; it errs if the transport did not say.
func caller(ctx context.Context) (Caller, error) {
	p, ok := peer.FromContext(ctx)
	if ok {
		if c, ok := p.AuthInfo.(Caller); ok {
			return c, nil
		}
	}
	return Caller{}, status.Error(codes.Unauthenticated, "the caller is not known")
}

// operator lets only root pass.
func operator(ctx context.Context, what string) error {
	c, err := caller(ctx)
	if err != nil {
		return err
	}
	if c.UID != 0 {
		return status.Errorf(codes.PermissionDenied, "%s may not %s: only root of this node may", c, what)
	}
	return nil
}

// mayAct answers a filter of the tenants that the caller acts for, at each
// moment that it is asked: a reload takes a right away from open streams too.
func (s *Server) mayAct(c Caller) func(tenant.Path) bool {
	return func(p tenant.Path) bool { return s.cfg.Sandboxes.Tenants().MayAct(c.UID, p) }
}
